"""Sampling from a checkpoint that describes itself."""

import json
import shutil

import av
import numpy as np
import pytest
from conftest import program

from vgjax import errors, sample
from vgjax.errors import UserError
from vgjax.training import checkpoint


@pytest.fixture(scope="module")
def sampler(trained):
    return sample.load(trained / "dit")


def test_the_command_writes_h264_a_contact_sheet_and_what_repeats_it(trained, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue square moves up\n\n")
    out = tmp_path / "out"
    where = ["--checkpoint", trained / "dit", "--out", out]
    what = ["--prompt", "a red circle moves left", "--prompts", prompts, "--num", 2, "--seed", 3]
    ran = program("sample", *where, *what)
    assert ran.returncode == 0, ran.stderr
    for i in range(4):
        with av.open(str(out / f"{i:03d}.mp4")) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert sum(1 for _ in container.decode(stream)) == 5
    assert (out / "contact_sheet.png").stat().st_size > 500
    record = json.loads((out / "sample.json").read_text())
    red, blue = "a red circle moves left", "a blue square moves up"
    assert [video["prompt"] for video in record["videos"]] == [red, red, blue, blue]
    assert record["seed"] == 3 and record["steps"] == 2 and record["cfg"] == 2.0 and record["size"] == [16, 16]


def test_the_same_seed_gives_the_same_video_whatever_is_sampled_beside_it(sampler):
    prompts = ["a red circle moves left", "a blue square moves up", "a red circle moves left"]
    together = sampler(prompts, seed=1)
    np.testing.assert_array_equal(together, sampler(prompts, seed=1))
    alone = sampler.latents(prompts[1:2], seed=1, first=1)
    np.testing.assert_allclose(alone[0], sampler.latents(prompts, seed=1)[1], atol=1e-4)
    assert (together[0] != together[2]).any()
    assert (together != sampler(prompts, seed=2)).any()


def test_every_setting_reaches_the_sample(sampler):
    base = np.asarray(sampler.latents(["a red circle moves left"]))
    for change in (
        dict(steps=3),
        dict(cfg=1.0),
        dict(cfg=5.0),
        dict(shift=3.0),
        dict(stepper="heun"),
        dict(rescale=0.7),
        dict(interval=(0.0, 0.2)),
        dict(negative="a blue square moves up"),
        dict(seed=5),
    ):
        assert (np.asarray(sampler.latents(["a red circle moves left"], **change)) != base).any(), change


def test_other_lengths_and_sizes_are_sampled_too(sampler):
    assert sampler(["a red circle moves left"], frames=9, size=(16, 24)).shape == (1, 9, 16, 24, 3)
    assert sampler(["a red circle moves left"], frames=1).shape == (1, 1, 16, 16, 3)


@pytest.mark.parametrize(
    "options,sentence",
    [
        (dict(frames=7), "nearest number of frames that works is 9"),
        (dict(size=(18, 16)), "nearest height that works is 16"),
        (dict(size=(20, 16)), "does not divide into patches"),
        (dict(steps=0), "at least 1"),
        (dict(interval=(0.6, 0.0)), "0 <= first < second <= 1"),
        (dict(stepper="rk9"), "use one of euler, heun, midpoint"),
    ],
)
def test_what_does_not_fit_is_named(sampler, options, sentence):
    with pytest.raises(UserError, match=sentence):
        sampler(["a red circle moves left"], **options)


def test_tiles_decode_what_the_whole_decodes(sampler):
    whole = sampler(["a red circle moves left"], size=(32, 32)).astype(int)
    tiled = sampler(["a red circle moves left"], size=(32, 32), tile=6).astype(int)
    assert whole.shape == tiled.shape and np.abs(whole - tiled).mean() < 3


def test_weights_are_the_average_unless_told_otherwise(trained):
    assert checkpoint.digest(sample.load(trained / "dit").params) == checkpoint.digest(
        checkpoint.load(trained / "dit", "ema")[0]
    )
    assert checkpoint.digest(sample.load(trained / "dit", "params").params) == checkpoint.digest(
        checkpoint.load(trained / "dit", "params")[0]
    )


def test_a_checkpoint_may_be_named_by_workdir_folder_or_step(trained):
    digests = {
        checkpoint.digest(sample.load(path).params)
        for path in (trained / "dit", trained / "dit" / "checkpoints", trained / "dit" / "checkpoints" / "00000006")
    }
    assert len(digests) == 1


def test_a_checkpoint_that_lacks_a_leaf_is_refused_by_name(trained, tmp_path):
    tree, meta, _ = checkpoint.load(trained / "dit")
    del tree["ema"]["velocity"]["model"]["velocity"]["bias"]
    partial = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints")
    partial.save(6, tree, meta, wait=True)
    shutil.copytree(trained / "dit" / "vae", tmp_path / "run" / "vae")
    with pytest.raises(UserError, match="velocity/bias is missing"):
        sample.load(tmp_path / "run")


REFUSED = {
    "missing checkpoint": (["--checkpoint", "nowhere", "--prompt", "x"], "no checkpoint at"),
    "a VAE": (["--checkpoint", "VAE", "--prompt", "x"], "not a text-to-video model"),
    "no prompts": (["--checkpoint", "DIT"], "no prompts to sample"),
    "empty prompt list": (["--checkpoint", "DIT", "--prompts", "EMPTY"], "no prompts to sample"),
    "prompts missing": (["--checkpoint", "DIT", "--prompts", "nowhere.txt"], "is not a file"),
    "prompts of another encoding": (["--checkpoint", "DIT", "--prompts", "LATIN"], "can't be read as UTF-8"),
    "size": (["--checkpoint", "DIT", "--prompt", "x", "--size", "large"], "write HEIGHTxWIDTH"),
    "codec": (["--checkpoint", "DIT", "--prompt", "a red circle moves left", "--codec", "prores9"], "prores9"),
    "foreign": (["--checkpoint", "EMPTYDIR", "--prompt", "x"], "holds no vgjax checkpoint"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_bad_input_is_one_sentence_and_exit_code_2(trained, tmp_path, capsys, case):
    args, sentence = REFUSED[case]
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "emptydir").mkdir()
    names = {"VAE": trained / "vae", "DIT": trained / "dit", "EMPTY": tmp_path / "empty.txt"}
    (tmp_path / "latin.txt").write_bytes("ein grüner Kreis".encode("latin-1"))
    names["LATIN"] = tmp_path / "latin.txt"
    names["EMPTYDIR"] = tmp_path / "emptydir"
    with pytest.raises(SystemExit) as stopped:
        sample.main(["sample", *(str(names.get(arg, arg)) for arg in args), "--out", str(tmp_path / "out")])
    assert stopped.value.code == errors.USER
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and sentence in said[-1] and len(said) == 1
