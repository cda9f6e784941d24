"""A flow that may be given frames: trained by a section of the config, sampled from words or from a picture."""

import json

import numpy as np
import pytest
from conftest import SMALL, program
from PIL import Image

from vgjax import errors, evaluate, experiment, train
from vgjax.errors import UserError
from vgjax.pipeline.opening import load
from vgjax.training.program import read_config

GIVEN = ["--config", "tests/tiny.py:dit", "--config.known.text=0.4", "--config.known.first=0.6"]


@pytest.fixture(scope="module")
def run(trained):
    """The workdir of a tiny run, beside the VAE and the latents of the others."""
    ran = program("train", *GIVEN, "--workdir", trained / "given", *SMALL, "--config.train.steps=4")
    assert ran.returncode == 0, ran.stderr[-3000:]
    return trained / "given"


def test_a_picture_is_the_first_frame_and_changes_the_rest(run, tmp_path):
    middle = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    picture = np.pad(middle, ((0, 0), (8, 8), (0, 0)))  # wider than the video
    Image.fromarray(picture).save(tmp_path / "a.png")
    asked = ["--checkpoint", run, "--prompt", "a red circle moves left", "--out", tmp_path / "out"]
    ran = program("sample", *asked, "--image", tmp_path / "a.png")
    assert ran.returncode == 0 and (tmp_path / "out" / "000.mp4").is_file(), ran.stderr
    pipeline = load(run)
    words, begun = (pipeline.sampled(["a red circle"], image=image, cfg=3.0) for image in (None, picture))
    first = pipeline.codec.encode(middle[None, None])
    np.testing.assert_allclose(begun[:, :1], first, atol=1e-5)
    assert np.abs(words[:, :1] - first).max() > 0.5 and (begun[:, 1:] != words[:, 1:]).any()


def test_eight_devices_that_share_the_frames_learn_as_one(trained, run):
    layout = "--config.layout=ulysses", "--config.layout.devices=8", "--config.train.steps=4"
    where = "--workdir", trained / "given on eight"
    ran = program("train", *GIVEN, *where, *SMALL, *layout, JAX_NUM_CPU_DEVICES="8")
    assert ran.returncode == 0, ran.stderr[-3000:]
    one, eight = (
        [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        for workdir in (run, trained / "given on eight")
    )
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_it_is_measured_with_the_first_frame_given(run, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        args = ["--checkpoint", run, "--clips", 2, "--prompts", 2, "--out", tmp_path / "scores.json"]
        evaluate.main(["evaluate", *map(str, args)])
    table = json.loads((tmp_path / "scores.json").read_text())
    assert stopped.value.code == 0 and set(table["first frame given"]) >= {"psnr", "all", "motion"}


def test_clips_of_one_latent_frame_leave_nothing_to_make(run):
    args = [*GIVEN, "--config.data.frames=1"], ["--config", "tests/tiny.py:vae"]
    config, vae = (read_config(["train", *some], "", workdir=False)[0] for some in args)
    built = experiment.build(experiment.resolve(config, run), vae)
    with pytest.raises(UserError, match="config.known: clips of config.data.frames=1 are one latent frame"):
        train.check(built, experiment.call("config.train", train.Schedule, config.train))


def test_shares_that_do_not_sum_are_refused(trained):
    ran = program("train", *GIVEN, "--config.known.text=0.9", "--workdir", trained / "unshared")
    assert ran.returncode == errors.USER and "config.known: text=0.9, first=0.6" in ran.stderr.splitlines()[-1]
