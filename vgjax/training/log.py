"""What a run tells: one progress bar, `metrics.jsonl`, TensorBoard events, pictures.

    WORKDIR/metrics.jsonl        one JSON object per logged step, each step once, also after a kill and a resume
    WORKDIR/events.jsonl         what happened: dropped steps and the like
    WORKDIR/tensorboard/         the numbers and the pictures
    WORKDIR/images/              <name>_<step>.png

Steps are dispatched ahead of the device, so the clock is read only where the device was waited for: after the first
step (which compiles) and at every flush. The time between two such readings, less what happened inside `pause`, is
exactly the time of the steps between them.
"""

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from vgjax.data.storage import replace, writing
from vgjax.typing import Array, Float, Json, PyTree, UInt8

# tensorboardX loads torch wherever it finds it, more than a second of each start, and needs it for nothing used here.
_torch = sys.modules.get("torch")
try:
    sys.modules["torch"] = _torch
    import tensorboardX
finally:
    if _torch is None:
        del sys.modules["torch"]


class Log:
    """The voice of one run; in a run of several processes only the first speaks. A context manager.

    samples, frames, tokens, flops: what one step processes on all devices (0: not shown). peak: FLOP/s of all devices.
    """

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        start_step: int = 0,
        every: int = 20,
        samples: int = 0,
        frames: int = 0,
        tokens: int = 0,
        flops: float | int = 0,
        peak: float | None = None,
    ):
        self.workdir, self.every = Path(workdir), every
        self.amounts, self.flops, self.peak = {"samples": samples, "frames": frames, "tokens": tokens}, flops, peak
        self.total, self.last = total_steps, start_step
        self.pending: list[dict[str, Array]] = []
        self.clock: float | None = None  # None until the first step, which compiles, is done
        self.timed, self.paused, self.waited = 0, 0.0, 0.0
        self.speaks = jax.process_index() == 0
        if not self.speaks:
            return
        with writing(self.workdir):
            self.workdir.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "events.jsonl"):
                keep_until(self.workdir / name, start_step)
            # Events that a killed run wrote after its last checkpoint are hidden by purge_step.
            self.events = tensorboardX.SummaryWriter(str(self.workdir / "tensorboard"), purge_step=start_step + 1)
        self.plain = not sys.stdout.isatty()
        self.bar = tqdm(total=total_steps, initial=start_step, file=sys.stdout, disable=self.plain, unit="step")

    def step(
        self, step: int, metrics: dict[str, Float[Array, "2"]], counts: Callable[[], dict[str, int]] = dict
    ) -> Json | None:
        """Takes the (sum, count) pairs of one step without waiting for them; the record on steps that are logged.

        `counts` are asked for only then.
        """
        self.pending.append(metrics)
        self.last = step
        if self.clock is None:
            jax.block_until_ready(metrics)
            self.clock, self.paused, self.waited = time.perf_counter(), 0.0, 0.0
        else:
            self.timed += 1
        return self.flush(counts()) if step % self.every == 0 or step >= self.total else None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetch of a batch: its share of the step time is logged as `data_wait`."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around sampling, evaluation and saving: waits for the device, then stops the step clock."""
        jax.block_until_ready(self.pending)
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def flush(self, counts: Mapping[str, int] | None = None) -> Json | None:
        """Waits for the device and writes the means since the last flush; None when there was no step."""
        if not self.pending:
            return None
        pairs = jax.device_get(self.pending)  # waits
        names = dict.fromkeys(name for metrics in pairs for name in metrics)
        record = {"step": self.last, **{name: _mean([m[name] for m in pairs if name in m]) for name in names}}
        record |= self._rates(time.perf_counter()) | dict(counts or {})
        count, self.pending = len(self.pending), []
        if self.speaks:
            with writing(self.workdir):
                self._append("metrics.jsonl", record)
                self.scalars(record["step"], {name: value for name, value in record.items() if name != "step"})
            self._show(record, count)
        return record

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Numbers for TensorBoard alone, such as an evaluation's."""
        if self.speaks:
            for name, value in values.items():
                if value is not None:
                    self.events.add_scalar(name, value, step)

    def images(self, step: int, name: str, image: UInt8[np.ndarray, "h w 3"] | Image.Image) -> None:
        """A picture for TensorBoard and as WORKDIR/images/<name>_<step>.png."""
        if self.speaks:
            path = self.workdir / "images" / f"{re.sub(r'[^0-9A-Za-z.-]+', '_', name)}_{step:08d}.png"
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(np.asarray(image)).save(path)
                self.events.add_image(name, np.asarray(image), step, dataformats="HWC")

    def event(self, step: int, kind: str, text: str) -> None:
        """Something that happened: a line that does not break the progress bar, and a record in `events.jsonl`."""
        if self.speaks:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()
            with writing(self.workdir):
                self._append("events.jsonl", {"step": step, "kind": kind, "text": text})

    def close(self) -> None:
        self.flush()
        if self.speaks:
            self.bar.close()
            self.events.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _append(self, name: str, record: Json) -> None:
        with open(self.workdir / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")

    def _rates(self, now: float) -> dict[str, float]:
        """Step time and what follows from it, over the steps since the clock was last read."""
        seconds = now - self.clock - self.paused
        timed, waited, self.clock, self.timed, self.paused, self.waited = self.timed, self.waited, now, 0, 0.0, 0.0
        if not timed:
            return {}
        step = seconds / timed
        rates = {"step_seconds": step, "data_wait": min(waited / seconds, 1.0)}
        rates |= {f"{name}_per_second": amount / step for name, amount in self.amounts.items() if amount}
        if self.flops:
            rates["tflops_per_second"] = self.flops / step / 1e12
        if self.flops and self.peak:
            rates["mfu"] = self.flops / step / self.peak
        return rates

    def _show(self, record: Json, count: int) -> None:
        told = {
            name: value for name, value in record.items() if name != "step" and "/" not in name
        }  # loss, not loss/t3
        short = {name: "nan" if value is None else f"{value:.4g}" for name, value in told.items()}
        self.bar.update(count)
        self.bar.set_postfix(short)
        if self.plain:
            left = (self.total - record["step"]) * record.get("step_seconds", math.nan)
            eta = tqdm.format_interval(left) if math.isfinite(left) else "?"
            line = "  ".join(f"{name} {value}" for name, value in short.items())
            print(f"step {record['step']}/{self.total}  {line}  eta {eta}", flush=True)


def keep_until(path: Path, step: int) -> None:
    """Drops the records after `step`, and a last line cut by a kill; the resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # half a line
            if json.loads(line)["step"] <= step:
                kept.append(line + b"\n")
    replace(path, b"".join(kept))


def _mean(pairs: list[PyTree]) -> float | None:
    """The mean over (sum, count) pairs; None, which is JSON's null, when it is not a finite number."""
    total, count = np.sum(np.asarray(pairs, np.float64), axis=0)
    return float(total / count) if count and math.isfinite(total / count) else None
