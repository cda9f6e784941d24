"""Sampling from a checkpoint that describes itself."""

import dataclasses
import json
import re
import shutil

import av
import jax
import numpy as np
import pytest
from conftest import program
from ml_collections import ConfigDict

from vgjax import errors, sample
from vgjax.data import video
from vgjax.errors import Diverged, UserError
from vgjax.pipeline import trained as trained_
from vgjax.pipeline.pipeline import Pipeline
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
    assert record["seed"] == 3 and record["steps"] == 2 and record["cfg"] == [2.0] and record["size"] == [16, 16]


def test_the_same_seed_gives_the_same_video_whatever_is_sampled_beside_it(sampler):
    prompts = ["a red circle moves left", "a blue square moves up", "a red circle moves left"]
    together = sampler(prompts, seed=1)
    np.testing.assert_array_equal(together, sampler(prompts, seed=1))
    alone = sampler.sampled(prompts[1:2], seed=1, first=1)
    np.testing.assert_allclose(alone[0], sampler.sampled(prompts, seed=1)[1], atol=1e-4)
    assert (together[0] != together[2]).any()
    assert (together != sampler(prompts, seed=2)).any()


def test_every_setting_reaches_the_sample(sampler):
    base = np.asarray(sampler.sampled(["a red circle moves left"]))
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
        assert (np.asarray(sampler.sampled(["a red circle moves left"], **change)) != base).any(), change


def test_other_lengths_and_sizes_are_sampled_too(sampler):
    assert sampler(["a red circle moves left"], frames=9, size=(16, 24)).shape == (1, 9, 16, 24, 3)
    assert sampler(["a red circle moves left"], frames=1).shape == (1, 1, 16, 16, 3)


@pytest.mark.parametrize(
    "options,sentence",
    [
        (dict(frames=7), "nearest number of frames that works is 9"),
        (dict(size=(18, 16)), "18x16 pixels .* the nearest that does is 16x16"),
        (dict(size=(20, 16)), "does not divide into patches"),
        (dict(steps=0), "at least 1"),
        (dict(interval=(0.6, 0.0)), "0 <= first < second <= 1"),
        (dict(stepper="rk9"), "use one of euler, heun, midpoint"),
        *((dict([(name, value)]), f"{name}=.*finite") for name, value in (("cfg", np.nan), ("shift", np.inf))),
        (dict(rescale=np.nan), "rescale=.*finite"),
        (dict(interval=(0.0, np.nan)), "interval=.*finite"),
        (dict(seed=-1), r"seed=-1 .*2\^64"),
        (dict(seed=2**64), r"seed=18446744073709551616 .*2\^64"),
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
    assert checkpoint.digest(sample.load(trained / "dit").source.params) == checkpoint.digest(
        checkpoint.load(trained / "dit", "ema")[0]
    )
    assert checkpoint.digest(sample.load(trained / "dit", "params").source.params) == checkpoint.digest(
        checkpoint.load(trained / "dit", "params")[0]
    )


def test_a_checkpoint_may_be_named_by_workdir_folder_or_step(trained):
    digests = {
        checkpoint.digest(sample.load(path).source.params)
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
    "cfg": (["--checkpoint", "DIT", "--prompt", "a red circle moves left", "--cfg", "nan"], "cfg=nan must be finite"),
    "seed": (["--checkpoint", "DIT", "--prompt", "x", "--seed", "-1"], "seed=-1"),
    "devices of no layout": (["--checkpoint", "DIT", "--prompt", "x", "--devices", "2"], "give --layout"),
    "codec that mp4 lacks": (["--checkpoint", "DIT", "--prompt", "a red circle", "--codec", "libvpx"], "'libvpx'"),
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


def test_sixty_four_bits_of_a_seed_count(sampler):
    seeds = 0, 2**32, 2**50, 2**64 - 1
    videos = [np.asarray(sampler.sampled(["a red circle moves left"], seed=seed)) for seed in seeds]
    assert all((a != b).any() for i, a in enumerate(videos) for b in videos[:i])


def run(*args):
    with pytest.raises(SystemExit) as stopped:
        sample.main(["sample", *map(str, args)])
    return stopped.value.code


def test_a_sample_that_is_not_finite_is_named_and_fails(trained, sampler, tmp_path, capsys, monkeypatch):
    broken = dataclasses.replace(sampler.source, params=jax.tree.map(lambda x: x * np.nan, sampler.source.params))
    monkeypatch.setattr(sample, "load", lambda *_: trained_.pipeline(broken))
    asked = ["--checkpoint", trained / "dit", "--prompt", "a red circle moves left", "--out", tmp_path]
    for tile in ([], ["--tile", 2]):
        assert run(*asked, *tile) == errors.DIVERGED
        said = capsys.readouterr().err
        assert "1 of 1 samples" in said and "a red circle moves left" in said and not list(tmp_path.iterdir())
    with pytest.raises(Diverged):
        trained_.pipeline(broken)(["a red circle moves left"])


@pytest.fixture
def still(trained, sampler, monkeypatch):
    """The command line of two videos that cost nothing."""
    clips = np.zeros((2, 5, 16, 16, 3), np.uint8)

    class Still(Pipeline):
        def __call__(self, captions, *args, **options):
            return clips

    monkeypatch.setattr(sample, "load", lambda *_: Still(**sampler.__dict__))
    return ["--checkpoint", trained / "dit", "--prompt", "a red circle moves left", "--num", 2]


def test_a_second_run_into_a_folder_goes_on_behind_what_is_there(still, tmp_path):
    for _ in range(3):
        assert run(*still, "--out", tmp_path) == 0
    names = [f"{i:03d}.mp4" for i in range(6)] + [
        f"{stem}{after}"
        for stem, end in (("contact_sheet", ".png"), ("sample", ".json"))
        for after in (end, f"_002{end}", f"_004{end}")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    record = json.loads((tmp_path / "sample_004.json").read_text())
    assert [one["file"] for one in record["videos"]] == ["004.mp4", "005.mp4"]
    assert [one["index"] for one in record["videos"]] == [0, 1]


def test_videos_that_cannot_be_written_are_kept_as_frames(still, tmp_path, capsys, monkeypatch):
    def full(path, *_, **__):
        raise UserError(f"{path}: can't be written (No space left on device)")

    monkeypatch.setattr(video, "check_codec", lambda *_: None)
    monkeypatch.setattr(video, "write_mp4", full)
    assert run(*still, "--out", tmp_path) == errors.USER
    kept = re.search(r"(\S+\.npz)", capsys.readouterr().err)[1]
    with np.load(kept) as frames:
        assert frames["videos"].shape == (2, 5, 16, 16, 3) and len(frames["prompts"]) == 2


def test_a_model_of_clips_at_their_own_rates_is_sampled_at_a_rate_that_is_said(still, sampler, tmp_path, monkeypatch):
    config = ConfigDict(sampler.source.experiment.config.to_dict())
    config.data.update(fps=None)
    built = dataclasses.replace(sampler.source.experiment, config=config)
    own = trained_.pipeline(dataclasses.replace(sampler.source, experiment=built))
    clips = np.zeros((2, 5, 16, 16, 3), np.uint8)
    monkeypatch.setattr(type(own), "__call__", lambda *_, **__: clips)
    monkeypatch.setattr(sample, "load", lambda *_: own)
    assert run(*still, "--out", tmp_path) == 0
    assert json.loads((tmp_path / "sample.json").read_text())["fps"] == trained_.FPS
    with av.open(str(tmp_path / "000.mp4")) as container:
        assert container.streams.video[0].average_rate == trained_.FPS


def test_prompts_that_are_cut_are_counted_once_on_stderr(still, tmp_path, capsys):
    assert run(*still, "--out", tmp_path) == 0
    assert not capsys.readouterr().err
    long = "one two three four five six seven eight nine ten"  # and the begin token: 11, of 8
    assert run(*still, "--prompt", long, "--num", 1, "--out", tmp_path) == 0
    said = capsys.readouterr().err
    assert said.count("note:") == 1 and "1 of 2 texts" in said and "8 tokens" in said and "11" in said


def test_weights_are_read_straight_onto_the_mesh(trained, monkeypatch):
    read, asked = checkpoint._read, []
    monkeypatch.setattr(checkpoint, "_read", lambda at, tree, *a, **k: asked.append(tree) or read(at, tree, *a, **k))
    spread = sample.load(trained / "dit", layout="fsdp", devices=8)
    leaves = jax.tree.leaves(asked)
    assert len(asked) == 2 and all(len(leaf.sharding.device_set) == 8 for leaf in leaves)
    large = [leaf for leaf in jax.tree.leaves(asked[-1]) if leaf.size >= 1024]
    assert large and not any(leaf.sharding.is_fully_replicated for leaf in large)
    monkeypatch.undo()
    assert checkpoint.digest(spread.source.params) == checkpoint.digest(sample.load(trained / "dit").source.params)


def test_devices_are_refused_without_a_layout(trained):
    with pytest.raises(UserError, match="devices=2"):
        sample.load(trained / "dit", devices=2)
