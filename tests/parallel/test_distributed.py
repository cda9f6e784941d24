"""Several processes are one run: the same losses, one step saved on SIGTERM, exact resume after a kill, no hang."""

import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, SMALL, program, started

from vgjax.data.video import read_image
from vgjax.errors import HUNG, PREEMPTED, USER, UserError
from vgjax.parallel import distributed, layouts

sys.path.insert(0, str(ROOT / "launch"))
from local import free_port  # noqa: E402

LONG = "--config.train.steps=100000"


class Job:
    """Processes that train `tests/tiny.py:dit` together; `script` is run in the place of `vgjax.train`.

    `seeds`: as processes of their own, each with a hash seed of its own, which forks of one process share.
    """

    def __init__(self, workdir, processes, *flags, devices=1, own=None, script=None, seeds=False):
        port, self.workdir = free_port(), workdir
        self.processes = []
        for i in range(processes):
            where = {"VGJAX_COORDINATOR": f"127.0.0.1:{port}", "VGJAX_PROCESSES": str(processes)}
            where |= {"VGJAX_PROCESS": str(i), "JAX_NUM_CPU_DEVICES": str(devices)}
            layout = [f"--config.layout.devices={processes * devices}", "--config.layout.kind=fsdp"]
            args = ["--config", "tests/tiny.py:dit", "--workdir", workdir]
            args = [*map(str, [*args, *layout, *SMALL, *flags]), *(own or {}).get(i, [])]
            with open(workdir.parent / f"log{i}", "w") as log:
                files = {"stdout": log, "stderr": log}
                if script or seeds:
                    command = [sys.executable, *(["-c", script] if script else ["-m", "vgjax.train"]), *args]
                    env = {**os.environ, **where, "JAX_PLATFORMS": "cpu"}
                    self.processes.append(subprocess.Popen(command, cwd=ROOT, env=env, **files))
                else:
                    self.processes.append(started("train", *args, **files, **where))

    def wait(self, limit=120):
        """The exit codes."""
        try:
            return [process.wait(limit) for process in self.processes]
        finally:
            self.kill()

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()

    def until(self, ready, limit=120):
        """Waits until something is true of the workdir."""
        end = time.monotonic() + limit
        while not ready():
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                self.kill()
                pytest.fail("".join(self.said(i)[-3000:] for i in range(len(self.processes))))
            time.sleep(0.02)

    def said(self, i):
        return (self.workdir.parent / f"log{i}").read_text()

    def steps(self):
        return sorted(int(path.name) for path in (self.workdir / "checkpoints").glob("[0-9]*"))

    def logged(self):
        file = self.workdir / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def digest(self):
        return re.search(r"state digest (\w{64})", self.said(0))[1]


def prepare(trained, folder):
    """A workdir beside a VAE, data and latents of its own."""
    for part in ("vae", "data", "latents"):
        shutil.copytree(trained / part, folder / part)
    meta = folder / "latents" / "meta.json"
    meta.write_text(meta.read_text().replace(str(trained), str(folder)))
    return folder / "dit"


@pytest.fixture
def prepared(trained, tmp_path):
    return prepare(trained, tmp_path)


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([record["loss"] for record in records])


@pytest.fixture(scope="module")
def alone(trained, tmp_path_factory):
    """The losses of one process with one device."""
    workdir = prepare(trained, tmp_path_factory.mktemp("alone"))
    job = Job(workdir, 1)
    assert job.wait() == [0], job.said(0)[-3000:]
    return losses(workdir)


@pytest.mark.parametrize("processes,devices", [(2, 2), (4, 1)])
def test_a_job_of_several_processes_has_the_losses_of_one(alone, prepared, processes, devices):
    job = Job(prepared, processes, devices=devices, seeds=processes == 2)
    assert job.wait() == [0] * processes, job.said(0)[-3000:]
    np.testing.assert_allclose(losses(prepared), alone, rtol=1e-5)


def test_a_process_killed_at_random_and_the_job_restarted_end_in_the_same_bits(prepared):
    flags = ["--config.train.steps=9", "--config.train.save_every=3"]
    whole = Job(prepared, 2, *flags)
    assert whole.wait() == [0, 0], whole.said(0)[-3000:]
    expected, rng = whole.digest(), random.Random(0)
    shutil.rmtree(prepared)
    for at in (rng.randint(1, 3), rng.randint(4, 6)):  # before the first checkpoint is whole, and behind one
        job = Job(prepared, 2, *flags)
        job.until(lambda job=job, at=at: job.logged() >= at)
        rng.choice(job.processes).kill()
        time.sleep(rng.uniform(0, 0.5))
        job.kill()
    last = Job(prepared, 2, *flags)
    assert last.wait() == [0, 0], last.said(0)[-3000:]
    assert last.digest() == expected


def test_sigterm_to_one_process_saves_one_step_of_all(prepared):
    job = Job(prepared, 2, LONG, "--config.train.save_every=100000")
    job.until(lambda: job.logged() >= 3)
    told = time.monotonic()
    job.processes[1].send_signal(signal.SIGTERM)
    assert job.wait() == [PREEMPTED, PREEMPTED], job.said(0)[-3000:]
    assert time.monotonic() - told < 10  # five seconds, and the end of two Pythons on shared cores
    (step,) = job.steps()
    for i in range(2):
        assert f"step {step} is saved" in job.said(i)


# Process 1 stops to read data after five batches, for ever.
STUCK = """
import os, time
from vgjax import train
from vgjax.training import program
from vgjax.data import pipeline
real = pipeline.Batches.__next__
def stuck(self):
    if self.step == 5 and os.environ["VGJAX_PROCESS"] == "1":  # the run looks at four batches before it starts
        time.sleep(1000)
    return real(self)
pipeline.Batches.__next__ = stuck
program.start()
train.main(["train", *__import__("sys").argv[1:]])
"""


def test_when_one_process_hangs_all_print_their_stacks_and_end_with_a_restartable_code(prepared):
    limit = 6
    job = Job(prepared, 2, LONG, f"--config.train.watchdog={limit}.0", script=STUCK)
    job.until(lambda: job.logged() >= 3)
    since = time.monotonic()
    assert job.wait() == [HUNG, HUNG], job.said(0)[-3000:]
    assert time.monotonic() - since < limit + 4
    for i in range(2):
        assert f"process {i} of 2 did nothing for {limit} s" in job.said(i)
        assert "Current thread" in job.said(i) or "Thread 0x" in job.said(i)


def test_a_process_with_another_config_is_named_and_nothing_starts(prepared):
    job = Job(prepared, 2, own={1: ["--config.optim.lr=0.5"]})
    assert job.wait() == [USER, USER]
    for i in range(2):
        assert "process 1 has another config than process 0" in job.said(i)
    assert not job.steps()


@pytest.mark.parametrize("row,part", enumerate(["config", "code", "versions", "local devices", "compiler flags"]))
def test_whatever_differs_between_processes_is_named_before_the_first_step(monkeypatch, row, part):
    def gathered(own):
        other = own.copy()
        other[row] += 1
        return np.stack([own, other])

    _, mesh = layouts.find("dp", 1)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gathered)
    with pytest.raises(UserError, match=f"process 1 has another {part} than process 0"):
        distributed.preflight({"seed": 0}, {"jax": "0"}, mesh)


def test_a_layout_that_leaves_a_process_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="leaves some of the 2 processes without a device"):
        layouts.find("dp", 1)


def test_a_job_without_latents_says_how_to_make_them(prepared):
    shutil.rmtree(prepared.parent / "latents")
    job = Job(prepared, 2)
    assert job.wait() == [USER, USER]
    assert "vgjax.encode" in job.said(0)


def test_several_processes_sample_the_videos_of_one(trained, tmp_path):
    asked = ["--checkpoint", trained / "dit", "--prompt", "a red circle moves left", "--num", "2"]
    here = {"JAX_NUM_CPU_DEVICES": "1"}
    one = program("sample", *asked, "--out", tmp_path / "one", **here)
    assert one.returncode == 0, one.stderr
    command = [sys.executable, "launch/local.py", "2", "vgjax.sample", *asked, "--layout", "ulysses"]
    command = [*map(str, command), "--out", str(tmp_path / "two")]
    two = subprocess.run(command, cwd=ROOT, env={**os.environ, **here}, capture_output=True, text=True)
    assert two.returncode == 0, two.stdout + two.stderr
    assert "in 2 process(es)" in two.stdout and "2 videos in" in two.stdout
    # Of every frame, before the encoder makes more of what is one level of rounding.
    sheets = (read_image(tmp_path / name / "contact_sheet.png").astype(int) for name in ("two", "one"))
    assert np.abs(np.subtract(*sheets)).max() <= 1


@pytest.mark.parametrize("module", ["encode", "evaluate"])
def test_what_runs_in_one_process_is_refused_in_a_job(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VGJAX_COORDINATOR", "auto")
    main = importlib.import_module(f"vgjax.{module}").main
    with pytest.raises(SystemExit) as stopped:
        main([module, "--checkpoint", str(tmp_path), *(["--data", "D", "--out", "O"] if module == "encode" else [])])
    assert stopped.value.code == USER and f"vgjax.{module} runs in one process" in capsys.readouterr().err
