"""A flow from scratch on a published VAE and two published encoders: learns, resumes, spreads, samples, is measured."""

import json
import re
import shutil

import jax
import numpy as np
import open_models
import pytest
from conftest import program
from ml_collections import ConfigDict

from vgjax import convert, encode, errors, evaluate, experiment
from vgjax.data.embeddings import Embeddings
from vgjax.data.sources import Latents
from vgjax.errors import UserError
from vgjax.open.store import Store
from vgjax.pipeline.frozen import frozen_of, prepared
from vgjax.pipeline.opening import load
from vgjax.pipeline.trained import wanted
from vgjax.training import checkpoint
from vgjax.training.program import read_config

SHORT = ("--config.train.image_every=0", "--config.optim.lr=0.01", "--config.optim.schedule=constant")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Converted folders: of HunyuanVideo its two encoders, of Wan its VAE and its encoder alone."""
    home = tmp_path_factory.mktemp("frozen")
    for name, make, only in (
        ("hunyuan_video", open_models.hunyuan_video, ("text_encoder", "text_encoder_2")),
        ("wan", open_models.wan, ("vae", "text_encoder")),
    ):
        make(home / name / "published")
        convert.convert(home / name / "published", home / name / "converted", None, None, only)
    return home


def flags(home):
    return [
        *("--config", "tests/tiny.py:frozen", f"--config.vae={home / 'wan' / 'converted'}"),
        f"--config.text.path={home / 'hunyuan_video' / 'converted'}",
    ]


def train(home, name, steps, *more, **environment):
    """(what was printed, the losses) of a run in `home/name`."""
    args = [*flags(home), *SHORT, "--workdir", home / name, f"--config.train.steps={steps}", *more]
    ran = program("train", *args, **environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = (home / name / "metrics.jsonl").read_text().splitlines()
    return ran.stdout, [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def straight(home):
    return train(home, "straight", 12)


def digest(printed):
    return re.search(r"state digest (\w{64})", printed)[1]


def test_parts_of_a_folder_are_converted_alone_and_unknown_ones_are_named(home, tmp_path):
    published = home / "wan" / "published"
    found = {path.name for path in (home / "wan" / "converted").iterdir() if path.is_dir()}
    assert found >= {"vae", "text_encoder", "tokenizer"} and "transformer" not in found
    with pytest.raises(UserError, match="--only nobody: .* names .*text_encoder"):
        convert.convert(published, tmp_path / "to", None, None, ("vae", "nobody"))


def test_it_learns_and_what_a_folder_lacks_is_not_missed(home, straight):
    assert np.mean(straight[1][-4:]) < 0.9 * np.mean(straight[1][:4])
    latents, texts = Latents(home / "latents"), Embeddings(home / "latents")
    rows = texts([latents.load(0)[1], ""])
    assert set(rows.text) == {"text_encoder"} and rows.vec.shape == (2, 24) and latents.meta["shape"] == [2, 4, 4, 4]


def test_a_resumed_run_is_the_same_to_the_bit(home, straight):
    train(home, "halves", 6)
    resumed, losses = train(home, "halves", 12)
    assert digest(resumed) == digest(straight[0]) and losses == straight[1]


def test_eight_devices_that_encoded_the_clips_too_learn_as_one(home, straight):
    more = "--config.layout=usp", "--config.layout.devices=8", f"--config.latents={home / 'latents of eight'}"
    _, losses = train(home, "spread", 4, *more, JAX_NUM_CPU_DEVICES="8")
    np.testing.assert_allclose(losses, straight[1][:4], rtol=1e-4)


def test_it_is_sampled_and_measured_by_its_workdir_alone(home, straight, tmp_path, capsys):
    ran = program("sample", "--checkpoint", home / "straight", "--prompt", "a red circle", "--out", tmp_path / "out")
    assert ran.returncode == 0 and (tmp_path / "out" / "000.mp4").is_file(), ran.stderr
    pipeline = load(home / "straight")
    one, other = (pipeline.sampled([prompt], cfg=5.0) for prompt in ("a cat walks", "a red dog runs"))
    assert (one != other).any()
    with pytest.raises(SystemExit) as stopped:
        args = ["--checkpoint", home / "straight", "--clips", 2, "--prompts", 2, "--out", tmp_path / "scores.json"]
        evaluate.main(["evaluate", *map(str, args)])
    table = json.loads((tmp_path / "scores.json").read_text())
    assert stopped.value.code == 0 and table["step"] == 12 and 0 < table["loss"]["loss"] < 3


def test_streams_of_several_folders_stand_side_by_side_and_other_encoders_are_refused(home, straight):
    config, _, _ = read_config(["train", *flags(home)], "", workdir=False)
    two = {
        "t5": {"path": str(home / "wan" / "converted"), "component": "text_encoder", "length": 7},
        "clip": {"component": "text_encoder_2", "gives": "both", "length": 5},
    }
    text = {**config.text.to_dict(), "encoders": two}
    config = ConfigDict(config.to_dict() | {"text": text})
    config, of_vae, frozen = prepared(experiment.resolve(config, home / "two"), home / "two")
    built = experiment.build(config, of_vae)
    rows, shapes = built.conditioner(["a cat", "a dog runs"]), built.conditioner.abstract(2)
    same = jax.tree.map(lambda row, shape: (row.shape, row.dtype) == (shape.shape, shape.dtype), rows, shapes)
    assert all(jax.tree.leaves(same)) and rows.tokens == 12
    batch = {"context": rows, "x": np.zeros((2, 2, 4, 4, 4), np.float32)}
    params = jax.eval_shape(lambda some: built.objective.init(jax.random.key(0), some), batch)
    assert set(params["velocity"]["text"]) == {"norm_t5", "norm_clip", "stream_t5", "stream_clip", "pool"}
    changed = config.to_dict()
    changed["text"]["encoders"]["t5"]["length"] = 8
    with pytest.raises(UserError, match="holds other text encoders, or asks them otherwise"):
        experiment.build(ConfigDict(changed), of_vae)


@pytest.mark.parametrize(
    "flag, sentence",
    [
        ("--config.text.encoders=()", "config.text.encoders names none"),
        ("--config.text.encoders=('transformer',)", "no converted folder that holds 'transformer'"),
        ("--config.text.path=/nowhere", "/nowhere is no converted folder"),
        ("--config.latents=", "config.latents is empty"),
        ("--config.text.kind=thawed", "config.text.kind='thawed' is unknown: use one of learned, frozen"),
        ("--config.text.blocks=3", "config.text.blocks is unknown"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_encoded(home, tmp_path, flag, sentence):
    ran = program("train", *flags(home), flag, "--workdir", tmp_path / "run")
    assert ran.returncode == errors.USER and sentence in ran.stderr.splitlines()[-1], ran.stderr
    assert not (tmp_path / "latents").exists()


def test_encode_writes_what_the_training_would_and_a_missing_vae_is_named(home, straight, capsys):
    with pytest.raises(SystemExit) as stopped:
        encode.main(["encode", *flags(home), "--workdir", str(home / "run"), f"--config.latents={home / 'again'}"])
    assert stopped.value.code == 0
    one, other = Latents(home / "again"), Latents(home / "latents")
    assert one.meta["meta"] == other.meta["meta"] and len(one) == len(other) == 24
    np.testing.assert_array_equal(one.load(5)[0], other.load(5)[0])
    with pytest.raises(SystemExit) as stopped:
        encode.main(["encode", *flags(home), f"--config.vae={home / 'hunyuan_video' / 'converted'}"])
    assert stopped.value.code == errors.USER and "vae" in capsys.readouterr().err


def test_encoders_that_were_named_from_here_are_found_from_elsewhere(home, tmp_path, monkeypatch):
    args = ["--config", "tests/tiny.py:frozen", "--config.vae=wan/converted", "--config.text.path=wan/converted"]
    config, _, _ = read_config(["train", *args, "--config.text.encoders=('text_encoder',)"], "", workdir=False)
    monkeypatch.chdir(home)
    config, of_vae, _ = frozen_of(experiment.resolve(config, tmp_path))
    monkeypatch.chdir(tmp_path)
    assert experiment.build(config, of_vae).conditioner(["a cat"]).tokens == 256


@pytest.mark.parametrize("size", ["s", "b"])
def test_the_config_for_published_parts_is_built(home, tmp_path, size):
    wan = home / "wan" / "converted"
    args = ["--config", f"configs/scratch.py:{size}", f"--config.vae={wan}", f"--config.text.path={wan}"]
    config, _, _ = read_config(["train", *args], "", workdir=False)
    built = experiment.build(*frozen_of(experiment.resolve(config, tmp_path))[:2])
    assert built.objective.model.text_dim == 768 and built.conditioner.abstract(3).tokens == 256
    assert sum(leaf.size for leaf in jax.tree.leaves(wanted(built))) > 10_000_000


def test_the_vae_in_the_workdir_is_the_published_one(home, straight):
    kept, _, _ = checkpoint.load(home / "straight" / "vae")
    _, params, _ = Store(home / "wan" / "converted").read("vae")
    jax.tree.map(np.testing.assert_array_equal, kept["ema"]["vae"], params)
    shutil.copytree(home / "straight", home / "moved")
    shutil.rmtree(home / "moved" / "checkpoints")
    with pytest.raises(AssertionError, match="is another VAE than"):
        args = [f"--config.vae={home / 'other'}"]
        convert.convert(home / "hunyuan_video" / "published", home / "other", None, None, ("vae",))
        train(home, "moved", 2, *args)
