"""Evaluation and encoding, from the trained checkpoints of a tiny run."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from vgjax import encode, errors, evaluate, experiment
from vgjax.data.sources import Clip, Folder, Latents
from vgjax.pipeline.frozen import frozen_vae
from vgjax.pipeline.pipeline import Pipeline
from vgjax.training import checkpoint


def run(main, *args):
    with pytest.raises(SystemExit) as stopped:
        main(["program", *map(str, args)])
    return stopped.value.code


def test_a_flow_is_measured_by_loss_bins_reconstruction_and_prompts(trained, tmp_path, capsys):
    out = tmp_path / "scores.json"
    for _ in range(2):
        assert run(evaluate.main, "--checkpoint", trained / "dit", "--out", out) == 0
        table = json.loads(out.read_text())
        assert set(table["loss"]) == {"loss", "loss/t0", "loss/t1", "loss/t2", "loss/t3"}
        assert np.isclose(table["loss"]["loss"], np.mean([table["loss"][f"loss/t{i}"] for i in range(4)]))
        assert 5 < table["vae"]["psnr"] < 60 and -1 <= table["vae"]["ssim"] <= 1
        for name in ("held-out prompts", "never-trained combinations"):
            assert 0 <= table[name]["all"] <= table[name]["color"] <= 1
        first = locals().get("first", table)
        assert table == first  # fixed clips, times and noise: the same figures every time
    assert "vae/psnr" in capsys.readouterr().out


def test_a_vae_is_measured_by_reconstruction(trained, tmp_path):
    out = tmp_path / "scores.json"
    assert run(evaluate.main, "--checkpoint", trained / "vae", "--out", out, "--clips", 2) == 0
    assert set(json.loads(out.read_text())) == {"checkpoint", "step", "vae"}


def test_what_a_checkpoint_lacks_and_a_folder_for_a_world_are_refused(trained, tmp_path, capsys):
    tree, meta, _ = checkpoint.load(trained / "vae")
    del tree["ema"]["vae"]["synthesis"]
    checkpoint.Checkpoints(tmp_path / "run" / "checkpoints").save(6, tree, meta, wait=True)
    assert run(evaluate.main, "--checkpoint", tmp_path / "run") == errors.USER
    assert "synthesis" in capsys.readouterr().err
    assert run(evaluate.main, "--checkpoint", trained / "dit", "--data", tmp_path) == errors.USER
    assert "a world of its own" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    assert run(evaluate.main, "--checkpoint", tmp_path / "nowhere") == errors.USER
    assert "no checkpoint at" in capsys.readouterr().err


def test_the_nearest_clip_of_a_sample_is_found_in_latent_space(trained):
    from vgjax import sample

    sampler = sample.load(trained / "dit")
    source = Folder(trained / "data" / "val")

    class Perfect(Pipeline):
        """A model that remembers every clip: its samples are latents of the captioned clip."""

        def sampled(self, captions, seed):
            of = {caption: i for i, (_, caption) in enumerate(source.records)}
            clips = [source.load(of[caption], Clip(5, (16, 16), 8.0), None)[0] for caption in captions]
            return sampler.codec.encode(np.stack(clips))

    perfect = Perfect(**sampler.__dict__)
    table = evaluate.nearest(perfect, source, Clip(5, (16, 16), 8.0), per_clip=1, windows=2)
    assert table["right"] == table["of"] == len(source)


def test_encoding_writes_latents_once_and_refuses_those_of_another_vae(trained, tmp_path, capsys):
    args = ["--checkpoint", trained / "vae", "--data", trained / "data" / "val"]
    out = tmp_path / "latents"
    assert run(encode.main, *args, "--out", out) == 0
    made = Latents(out)
    assert len(made) == 8 and made.load(0)[0].shape == (2, 4, 4, 4)
    assert np.isfinite(made.load(7)[0]).all()
    before = (out / "latents.array_record").stat().st_mtime_ns
    assert run(encode.main, *args, "--out", out) == 0
    assert (out / "latents.array_record").stat().st_mtime_ns == before
    assert run(encode.main, *args, "--out", out, "--frames", 9) == errors.USER
    assert "made with another frames" in capsys.readouterr().err


def test_latents_are_the_encoders_means(trained):
    config, frozen = frozen_vae(trained / "vae")
    vae = experiment.model("config.model", config.model, experiment.compute_dtype("float32"))
    source, made = Folder(trained / "data" / "train"), Latents(trained / "latents")
    clip, caption = source.load(3, Clip(5, (16, 16), 8.0), None)
    mean, _ = vae.apply({"params": frozen["vae"]}, jnp.asarray(clip[None] / 127.5 - 1, jnp.float32), method="encode")
    latent, stored = made.load(3)
    np.testing.assert_allclose(latent, mean[0], atol=1e-5)
    assert stored == caption
