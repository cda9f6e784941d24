"""The training program as its users meet it: exact resume, clear words, honest exit codes."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from conftest import ROOT, SMALL, program, python, started
from ml_collections import ConfigDict

from vgjax import errors, experiment, train
from vgjax.data import pipeline
from vgjax.data.sources import Folder, Latents, LatentWriter
from vgjax.data.storage import alone
from vgjax.parallel import distributed, layouts
from vgjax.pipeline import frozen as frozen_
from vgjax.pipeline.frozen import own_vae
from vgjax.training import checkpoint
from vgjax.training.program import read_config

DIT = ("--config", "tests/tiny.py:dit")
TINIER = (*DIT, *SMALL, "--config.train.steps=9", "--config.train.save_every=3")


def digest_of(stdout: str) -> str:
    return re.search(r"state digest (\w{64})", stdout)[1]


def copied(trained, tmp_path):
    """The trained VAE, its clips and its latents, without the DiT."""
    for part in ("vae", "data", "latents"):
        shutil.copytree(trained / part, tmp_path / part)
    meta = tmp_path / "latents" / "meta.json"
    meta.write_text(meta.read_text().replace(str(trained), str(tmp_path)))
    return tmp_path


@pytest.fixture(scope="module")
def straight(trained, tmp_path_factory):
    """The digest of a `TINIER` run that nothing disturbed."""
    home = copied(trained, tmp_path_factory.mktemp("straight"))
    ran = program("train", *TINIER, "--workdir", home / "dit")
    assert ran.returncode == 0, ran.stderr
    return digest_of(ran.stdout)


def test_a_run_leaves_checkpoints_metrics_pictures_and_its_config(trained):
    for run, picture in (("vae", "reconstructions"), ("dit", "samples")):
        folder = trained / run
        assert checkpoint.Checkpoints(folder / "checkpoints").steps() == [2, 4, 6]
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
        assert all(np.isfinite(record["loss"]) for record in records)
        assert records[-1]["data/bad_files"] == records[-1]["data/restarts"] == 0
        assert records[-1]["tflops_per_second"] > 0 and records[-1]["samples_per_second"] > 0
        assert list((folder / "images").glob(f"{picture}_*.png"))
        assert list((folder / "tensorboard").iterdir())
        assert json.loads((folder / "config.json").read_text())["train"]["steps"] == 6
    assert "config: the file's defaults" in (trained / "dit.log").read_text()
    assert {f"loss/t{i}" for i in range(4)} <= set(records[-1])


def test_a_first_start_on_eight_devices_encodes_the_latents_of_one(trained, tmp_path):
    copied(trained, tmp_path)
    before = Latents(tmp_path / "latents")
    shutil.move(tmp_path / "latents", tmp_path / "of one")
    spread = "--config.layout.kind=usp", "--config.layout.devices=8", "--config.train.batch=8"
    args = *TINIER, *spread, "--config.train.steps=3", "--workdir", tmp_path / "dit"
    ran = program("train", *args, JAX_NUM_CPU_DEVICES="8")
    assert ran.returncode == 0 and "encoded 24 of 24 clips" in ran.stdout, ran.stderr[-2000:]
    ours, theirs = (Latents(tmp_path / name) for name in ("latents", "of one"))
    assert len(ours) == len(before) == 24
    for i in range(24):
        np.testing.assert_allclose(ours.load(i)[0], theirs.load(i)[0], atol=1e-5)


@pytest.mark.parametrize("after", ["parameters on", "step 2/", "step 5/"])
def test_killed_anywhere_and_restarted_it_ends_bit_identical(trained, straight, tmp_path, after):
    copied(trained, tmp_path)
    args = [*TINIER, "--workdir", tmp_path / "dit"]
    victim = started("train", *args, stdout=subprocess.PIPE, stderr=sys.__stderr__)
    for line in victim.stdout:
        if after in line:
            break
    time.sleep(random.Random(after).uniform(0, 0.1))
    victim.kill()
    victim.wait()
    assert victim.returncode == -signal.SIGKILL
    # One of them a `python -m`: its strings have other hashes than those of the undisturbed run.
    again = (python if after == "parameters on" else program)("train", *args)
    assert again.returncode == 0, again.stderr
    assert digest_of(again.stdout) == straight
    steps = [json.loads(line)["step"] for line in (tmp_path / "dit" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 10))


def test_sigterm_saves_and_exits_restartable_and_the_rest_is_bit_identical(trained, straight, tmp_path):
    copied(trained, tmp_path)
    args = [*TINIER, "--workdir", str(tmp_path / "dit"), "--config.train.save_every=1000"]
    with open(tmp_path / "stderr", "w") as stderr:
        victim = started("train", *args, stdout=subprocess.PIPE, stderr=stderr)
    for line in victim.stdout:
        if line.startswith("step 1/"):
            victim.send_signal(signal.SIGTERM)
            break
    victim.wait(120)
    said = (tmp_path / "stderr").read_text()
    if victim.returncode != 0:  # else it was done before the signal came
        assert victim.returncode == errors.PREEMPTED
        assert re.search(r"error: stopped by SIGTERM; step \d+ is saved", said)
        assert checkpoint.Checkpoints(tmp_path / "dit" / "checkpoints").steps()
    again = program("train", *args)
    assert again.returncode == 0, again.stderr
    assert digest_of(again.stdout) == straight


def test_a_finished_run_started_again_changes_nothing(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "all")
    meta = tmp_path / "all" / "latents" / "meta.json"
    meta.write_text(meta.read_text().replace(str(trained), str(tmp_path / "all")))
    again = program("train", *DIT, "--workdir", tmp_path / "all" / "dit")
    assert again.returncode == 0, again.stderr
    assert digest_of(again.stdout) == digest_of((trained / "dit.log").read_text())


def with_bad_latents(trained, tmp_path, share: float):
    copied(trained, tmp_path)
    old = Latents(tmp_path / "latents")
    records = [old.load(i) for i in range(len(old))]
    shutil.rmtree(tmp_path / "latents")
    with LatentWriter(tmp_path / "latents", old.meta["meta"]) as writer:
        for i, (latent, caption) in enumerate(records):
            latent = latent.copy()
            if i < share * len(records):
                latent[0, 0, 0, 0] = np.nan
            writer.add(latent, caption, i)


def test_a_nan_sample_drops_its_steps_and_training_goes_on(trained, tmp_path):
    with_bad_latents(trained, tmp_path, 1 / 24)
    ran = program("train", *TINIER, "--workdir", tmp_path / "dit", "--config.train.steps=6")
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"step \d was not finite and is dropped; sample ids \[", ran.stdout + ran.stderr)
    tree, _, _ = checkpoint.load(tmp_path / "dit")
    assert 1 <= int(tree["dropped"][1]) < 6
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in _leaves(tree["ema"]))


def test_too_many_bad_steps_in_a_row_stop_the_run_with_its_own_exit_code(trained, tmp_path):
    with_bad_latents(trained, tmp_path, 1.0)
    ran = program("train", *TINIER, "--workdir", tmp_path / "dit", "--config.train.max_dropped=3")
    assert ran.returncode == errors.DIVERGED
    assert "steps in a row were not finite" in ran.stderr


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)


REFUSED = {
    "missing config": (["--config", "configs/nope.py"], "there is no such file"),
    "no config": ([], "--config is missing"),
    "unknown key": (["--config", "tests/tiny.py:vae", "--config.optim.lrr=1"], "config.optim.lrr is unknown: known"),
    "unknown option": (["--config", "tests/tiny.py:vae", "--config.layout.tenor=2"], "config.layout.tenor is unknown"),
    "mistyped option": (["--config", "tests/tiny.py:vae", "--config.layout.tensor=two"], "must be of type int"),
    "mistyped value": (["--config", "tests/tiny.py:vae", "--config.optim.lr=fast"], "could not convert"),
    "unknown flag": (["--config", "tests/tiny.py:vae", "--wrkdir=x"], "wrkdir"),
    "size": (["--config", "tests/tiny.py:vae", "--config.data.size=(18,18)"], "nearest height that works is"),
    "frames": (["--config", "tests/tiny.py:vae", "--config.data.frames=6"], "nearest number of frames that works is 5"),
    "devices": (["--config", "tests/tiny.py:vae", "--config.layout.devices=4096"], "more devices than"),
    "layout": (["--config", "tests/tiny.py:vae", "--config.layout.kind=3d"], "use one of dp, fsdp"),
    "kind": (
        ["--config", "tests/tiny.py:vae", "--config.model.kind=unet"],
        "use one of causal_vae, hunyuan_vae, wan_vae, mmdit",
    ),
    "batch": (["--config", "tests/tiny.py:vae", "--config.train.batch=0"], "config.train.batch=0 must be at least 1"),
    "world": (["--config", "tests/tiny.py:vae", "--config.data.world=big"], "small, full"),
    "data option": (["--config", "tests/tiny.py:vae", "--config.data.sise=8"], "config.data.sise is unknown: known"),
    "accumulate": (["--config", "tests/tiny.py:vae", "--config.optim.accumulate=3"], "that do are 3 and 6"),
    "micro-batch": (
        ["--config", "tests/tiny.py:vae", "--config.optim.accumulate=2", "--config.layout.devices=4"],
        "does not divide into 8, the 4 device(s) of the batch times config.optim.accumulate=2",
    ),
    "average": (["--config", "tests/tiny.py:vae", "--config.optim.ema=1.5"], "0 <= ema < 1"),
    "no vae": (["--config", "tests/tiny.py:dit"], "no checkpoint at"),
    "precision": (["--config", "tests/tiny.py:vae", "--config.precision=float8"], "use one of auto"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_bad_input_is_one_sentence_and_exit_code_2(case, tmp_path, capsys):
    args, sentence = REFUSED[case]
    with pytest.raises(SystemExit) as stopped:
        train.main(["train", *args, "--workdir", str(tmp_path / "run")])
    assert stopped.value.code == errors.USER
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("error: ") and sentence in said[0]


class Untouched:
    """A source whose records must not be read."""

    def __init__(self, source):
        self.kind, self.path, self.skipped = source.kind, source.path, source.skipped
        self.meta = getattr(source, "meta", None)

    def __len__(self):
        return 24

    def name(self, record):
        return f"{self.path}/{record}"

    def load(self, record, clip=None, rng=None):
        pytest.fail("a record was read")


@pytest.mark.parametrize("arg,kind", [("vae", "video"), ("dit", "latent"), ("dit", "video")])
def test_the_shapes_of_a_batch_are_those_that_the_loader_gives_and_cost_no_reading(trained, arg, kind):
    config, _, _ = read_config(["train", "--config", f"tests/tiny.py:{arg}"], "", workdir=False)
    built = experiment.build(config, ConfigDict(tiny.get_config("vae")))
    source = Folder(trained / "data" / "train") if kind == "video" else Latents(trained / "latents")
    how = dict(seed=0, batch=4, conditioner=built.conditioner, drop_caption=0.1, frames=5, size=(16, 16), fps=8.0)
    real = next(pipeline.batches(source, **how))
    promised = train.abstract_batch(built, Untouched(source), 4)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), promised) == jax.tree.map(
        lambda array: (array.shape, array.dtype), real
    )


def test_the_first_batches_are_read_when_asked_for_and_only_the_rows_of_this_process(trained, monkeypatch):
    asked, layout_and_mesh = [], layouts.find("dp", 4)
    real = pipeline.batches
    monkeypatch.setattr(pipeline, "batches", lambda *a, **k: asked.append(k.get("rows")) or real(*a, **k))
    how = dict(seed=0, batch=4, conditioner=None, drop_caption=0.0, frames=5, size=(16, 16), fps=8.0)
    batches = train.first(Folder(trained / "data" / "train"), how, (0, 4), layout_and_mesh)
    assert not asked
    found = [batch["video"] for batch in batches]
    assert asked == [(0, 4)] and len(found) == 4
    assert {shard.data.shape[0] for shard in found[0].addressable_shards} == {1}


@pytest.mark.parametrize(
    "flag,sentence",
    [
        ("--config.sample.steps=0", "steps=0"),
        ("--config.sample.stepper=rk9", "use one of euler"),
        ("--config.model.patch=(1,3,3)", "does not divide into patches"),
        ("--config.data.size=(20,20)", "does not divide into patches"),
    ],
)
def test_what_only_a_picture_would_show_is_said_before_anything_is_encoded(trained, tmp_path, capsys, flag, sentence):
    shutil.copytree(trained / "vae", tmp_path / "vae")
    with pytest.raises(SystemExit) as stopped:
        train.main(["train", *DIT, "--workdir", str(tmp_path / "dit"), flag])
    assert stopped.value.code == errors.USER
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "latents").exists() and not (tmp_path / "data").exists()


def test_another_seed_or_a_second_training_in_a_workdir_are_refused(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "all")
    vae = ["train", "--config", "tests/tiny.py:vae", "--workdir", str(tmp_path / "all" / "vae")]
    with pytest.raises(SystemExit) as stopped:
        train.main([*vae, "--config.seed=7", "--config.data.path=" + str(trained / "data")])
    assert stopped.value.code == errors.USER and "holds shapes written with another seed" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "all" / "data")
    with pytest.raises(SystemExit) as stopped:
        train.main([*vae, "--config.seed=7"])
    assert (
        stopped.value.code == errors.USER and "was trained with config.seed=0 until step 6" in capsys.readouterr().err
    )
    hold = (
        "import pathlib, sys\nfrom vgjax.data.storage import alone\n"
        "with alone(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "all" / "vae")]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit) as stopped:
            train.main(vae)
        other.stdin.close()
    assert stopped.value.code == errors.USER and "another training writes to" in capsys.readouterr().err


def test_holding_a_workdir_renames_no_error_of_the_run(tmp_path):
    with pytest.raises(ConnectionResetError), alone(tmp_path):
        raise ConnectionResetError("of something else")
    with alone(tmp_path):  # and it is free again
        pass


def test_the_kept_vae_is_used_and_another_one_is_refused(trained, tmp_path, monkeypatch):
    workdir, vae = tmp_path / "dit", Path(shutil.copytree(trained / "vae", tmp_path / "vae"))
    _, first = own_vae(str(vae), workdir)
    steps = vae / checkpoint.SUBDIR
    moved = Path(shutil.copytree(steps / "00000006", tmp_path / "moved"))
    again = tmp_path / "again"  # the same weights, in other files
    meta = checkpoint.meta(moved)
    checkpoint.Checkpoints(again / checkpoint.SUBDIR).save(0, checkpoint.load(moved, ["ema"])[0], meta, wait=True)
    for named in (vae, moved, again, workdir / "vae", tmp_path / "gone"):
        _, kept = own_vae(str(named), workdir)
        assert checkpoint.digest(kept) == checkpoint.digest(first)
    with pytest.raises(errors.UserError, match=r"00000004 is another VAE than .*/dit/vae.* go on with --config.vae="):
        own_vae(str(steps / "00000004"), workdir)


def test_a_job_copies_the_vae_whole_or_not_at_all(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_.jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda x: x)
    monkeypatch.setattr(frozen_, "frozen_vae", lambda path: (ConfigDict(), checkpoint.meta(path)["stats"]))
    own = tmp_path / "dit" / "vae"
    own.parent.mkdir()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as moment, pytest.raises(KeyboardInterrupt):
        moment.setattr(frozen_, "fsync", killed)
        own_vae(str(trained / "vae"), own.parent)
    assert not own.exists()
    own_vae(str(trained / "vae"), own.parent)
    assert checkpoint.meta(own)["step"] == 6 and [path.name for path in own.parent.iterdir()] == ["vae"]
    own_vae(str(trained / "vae"), own.parent)


def test_nothing_in_a_workdir_is_touched_before_it_is_held(trained, tmp_path, monkeypatch):
    from vgjax import train

    class Held(Exception):
        pass

    def refuse(_):
        raise Held

    shutil.copytree(trained / "vae", tmp_path / "vae")
    monkeypatch.setattr(train, "alone", refuse)
    with pytest.raises(Held):
        train.main.__wrapped__(["train", *DIT, "--workdir", str(tmp_path / "dit")])
    assert not list((tmp_path / "dit").iterdir())


def test_another_batch_goes_on_at_the_same_sample_or_is_refused():
    from vgjax import train
    from vgjax.training.state import TrainState

    class Kept(checkpoint.Checkpoints):
        def __init__(self):
            self.directory = "run/checkpoints"

        def restore(self, abstract):
            saved = {"data": {"seed": 0, "samples": 24}, "config": {"train": {"batch": 4}}}
            return TrainState(*[None] * 6), saved, 6

    def resumed(batch):
        return train.restored(Kept(), None, ConfigDict({"seed": 0, "train": {"batch": batch}}))

    assert [resumed(batch)[1] // batch for batch in (4, 8, 3)] == [6, 3, 8]
    with pytest.raises(errors.UserError, match="batch=5: .* behind 24 samples, no multiple of it: go on with 4"):
        resumed(5)


def test_a_broken_config_an_unwritable_workdir_and_an_empty_folder_are_named(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config(:")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    tiny = ["--config", "tests/tiny.py:vae"]
    folder = ["--config.data.kind=folder", f"--config.data.path={tmp_path / 'empty'}"]
    for args, sentence in (
        (["--config", str(broken), "--workdir", str(tmp_path / "run")], "SyntaxError"),
        ([*tiny, "--workdir", str(tmp_path / "file" / "run")], f"cannot write to {tmp_path / 'file' / 'run'}"),
        ([*tiny, *folder, "--workdir", str(tmp_path / "run")], "holds no videos or images"),
    ):
        with pytest.raises(SystemExit) as stopped:
            train.main(["train", *args])
        assert stopped.value.code == errors.USER
        assert sentence in capsys.readouterr().err


def test_a_full_disk_is_a_storage_error(trained, tmp_path, monkeypatch, capsys):
    from vgjax import train
    from vgjax.data import storage

    copied(trained, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "seal", full)
    assert storage
    with pytest.raises(SystemExit) as stopped:
        train.main(["train", *DIT, "--workdir", str(tmp_path / "dit")])
    assert stopped.value.code == errors.STORAGE
    assert "No space left on device" in capsys.readouterr().err
