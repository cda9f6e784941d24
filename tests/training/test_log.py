"""The record of a run: true means, true rates, each step once, valid JSON whatever the numbers are."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from vgjax.errors import StorageError
from vgjax.training import log
from vgjax.training.log import Log


def pair(total: float, count: float = 1.0) -> jax.Array:
    return jnp.array([total, count], jnp.float32)


def records(workdir: Path) -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir: Path) -> list[Event]:
    """Reads TensorBoard's record format: length, its checksum, the event, its checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def test_means_weigh_every_sample_once_and_are_written_every_n_steps(tmp_path):
    with Log(tmp_path, total_steps=5, every=2) as run:
        told = [run.step(s, {"loss": pair(s * 10.0, s), "bin": pair(0.0, s % 2)}) for s in range(1, 6)]
    assert [record["step"] for record in records(tmp_path)] == [2, 4, 5]  # the last step is logged though it is odd
    assert [record["loss"] for record in records(tmp_path)] == [10.0, 10.0, 10.0]
    assert told[0] is None and told[1] == records(tmp_path)[0]
    with Log(tmp_path / "weights", total_steps=2, every=2) as run:
        run.step(1, {"loss": pair(1.0, 1)})
        assert run.step(2, {"loss": pair(0.0, 3)})["loss"] == 0.25


def test_steps_between_flushes_do_not_wait_for_the_device(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waits.append("block") or x)
    monkeypatch.setattr(jax, "device_get", lambda x: waits.append("get") or [{"loss": (1.0, 1.0)} for _ in x])
    with Log(tmp_path, total_steps=100, every=10) as run:
        for step in range(1, 11):
            run.step(step, {"loss": pair(1.0)})
            assert waits == ["block"] + ["get"] * (step == 10)  # the first step is waited for: it compiles


def test_numbers_that_are_not_finite_are_null_in_valid_json(tmp_path):
    with Log(tmp_path, total_steps=1) as run:
        run.step(1, {"nan": pair(np.nan), "inf": pair(np.inf), "none": pair(0.0, 0.0), "loss": pair(2.0)})
    (record,) = records(tmp_path)
    assert [record[name] for name in ("nan", "inf", "none", "loss")] == [None, None, None, 2.0]


def test_a_resumed_run_has_each_step_once(tmp_path):
    with Log(tmp_path, total_steps=10, every=2) as run:
        for step in range(1, 9):
            run.step(step, {"loss": pair(1.0)})
        run.event(4, "dropped", "step 4 was dropped")
        run.event(6, "dropped", "step 6 was dropped")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 10, "lo')  # killed while writing
    with Log(tmp_path, total_steps=10, start_step=5, every=2) as run:
        assert [record["step"] for record in records(tmp_path)] == [2, 4]
        assert "step 6" not in (tmp_path / "events.jsonl").read_text()
        for step in range(6, 11):
            run.step(step, {"loss": pair(2.0)})
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(2, 1), (4, 1), (6, 2), (8, 2), (10, 2)]


def test_rates_leave_out_the_compiling_step_and_pauses(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    work = dict(samples=4, frames=68, tokens=320, flops=3e12, peak=1e13)
    with Log(tmp_path, total_steps=8, every=4, **work) as run:
        for step in range(1, 9):
            with run.waiting():
                now[0] += 0.1
            now[0] += 100.0 if step == 1 else 0.4
            run.step(step, {"loss": pair(1.0)})
            if step == 6:
                with run.pause():
                    now[0] += 50.0
    for record in records(tmp_path):
        assert record["step_seconds"] == pytest.approx(0.5)
        assert record["data_wait"] == pytest.approx(0.2)
        assert record["samples_per_second"] == pytest.approx(8)
        assert record["frames_per_second"] == pytest.approx(136)
        assert record["tokens_per_second"] == pytest.approx(640)
        assert record["tflops_per_second"] == pytest.approx(6)
        assert record["mfu"] == pytest.approx(0.6)


def test_mfu_is_left_out_where_the_peak_is_unknown(tmp_path):
    with Log(tmp_path, total_steps=2, every=2, flops=1e9) as run:
        run.step(1, {"loss": pair(1.0)})
        record = run.step(2, {"loss": pair(1.0)})
    assert "tflops_per_second" in record and not {"mfu", "samples_per_second"} & record.keys()


def test_a_line_with_loss_and_eta_is_printed_when_stdout_is_no_terminal(tmp_path, capsys):
    with Log(tmp_path, total_steps=4, every=2) as run:
        for step in range(1, 5):
            run.step(step, {"loss": pair(0.125), "loss/t0": pair(0.5)})
        run.event(3, "saved", "step 3 is saved")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and "loss/t0" not in lines[0] and lines[0].startswith("step 2/4  loss 0.125  step_seconds ")
    assert "eta 00:00" in lines[1] and lines[2] == "step 3 is saved"
    event = json.loads((tmp_path / "events.jsonl").read_text())
    assert event == {"step": 3, "kind": "saved", "text": "step 3 is saved"}


def test_a_terminal_gets_one_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with Log(tmp_path, total_steps=4, start_step=2, every=1) as run:
        for step in (3, 4):
            run.step(step, {"loss": pair(0.125)})
    out = capsys.readouterr().out
    assert "2/4" in out and "4/4" in out and "loss=0.125" in out and "step 4/4" not in out


def test_pictures_and_numbers_reach_tensorboard_and_the_image_folder(tmp_path):
    picture = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    with Log(tmp_path, total_steps=1) as run:
        run.step(1, {"loss": pair(0.5)})
        run.scalars(1, {"psnr": 31.0, "unknown": None})
        run.images(1, "samples/ema", picture)
    assert (np.asarray(Image.open(tmp_path / "images" / "samples_ema_00000001.png")) == picture).all()
    values = {value.tag: value for event in events(tmp_path) for value in event.summary.value}
    assert values["loss"].simple_value == 0.5 and values["psnr"].simple_value == 31.0 and "unknown" not in values
    assert (values["samples/ema"].image.height, values["samples/ema"].image.width) == (8, 12)


def test_tensorboard_hides_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    with Log(tmp_path, total_steps=9, start_step=5):
        pass
    starts = [event.step for event in events(tmp_path) if event.HasField("session_log")]
    assert starts == [6]


def test_processes_but_the_first_are_silent(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Log(tmp_path / "run", total_steps=1) as run:
        assert run.step(1, {"loss": pair(1.0)})["loss"] == 1.0
        run.event(1, "greeting", "hello")
        run.images(1, "x", np.zeros((2, 2, 3), np.uint8))
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_workdir_that_cannot_be_written_is_told_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write to .*file/run: Not a directory"):
        Log(tmp_path / "file" / "run", total_steps=1)


def test_the_rewrite_of_old_records_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError):
        log.keep_until(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_start_loads_no_torch():
    done = subprocess.run([sys.executable, "-c", "import sys, vgjax.train; sys.exit('torch' in sys.modules)"], cwd=ROOT)
    assert done.returncode == 0
