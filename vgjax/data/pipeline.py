"""The training stream: grain decides the order, workers load, a watchdog keeps it from ever hanging.

Batch number `step` is a function of (seed, step) alone: the same for any number of workers, and after a resume, which
just starts at `start_step`. So a dead worker costs nothing but its restart.
"""

import functools
import logging
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import jax
import numpy as np
from absl import flags

from vgjax.data.decode import Unreadable
from vgjax.data.sources import Clip, Source, read
from vgjax.data.transforms import BadFiles, Load, names
from vgjax.errors import LoaderError, UserError
from vgjax.typing import Context, PyTree

Batch = dict[str, PyTree]
ONE_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
IN_PLACE = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
SHARE = 1 / 4  # of the time for a batch that one record may take: a slow file is then replaced, and the batch comes
GRACE_S = 3.0  # for workers to finish their batch and free shared memory before they are killed


def batches(
    source: Source,
    *,
    seed: int,
    batch: int,
    conditioner: Callable[[Sequence[str]], Context] | None,
    drop_caption: float | int,
    frames: int = 1,
    size: tuple[int, int] = (1, 1),
    fps: float | int | None = None,
    start_step: int = 0,
    workers: int = 0,
    threads: int = 2,
    bad_files: str | Path | None = None,
    max_bad: float | int = 0.1,
    timeout_s: float | int = 300.0,
    rows: tuple[int, int] | None = None,
) -> "Batches":
    """Endless batches from `start_step` on: video uint8 `b t h w c` or latent f32, index, id, and the Context.

    `rows` (first, end) gives only these rows of every batch, those that a process of several needs.
    `frames`, `size` (height, width) and `fps` are for videos; latents are what they are. With `workers` each batch is
    loaded in one of as many processes, otherwise in `threads` of this one. A record that can't be used is replaced by
    the next one and listed in `bad_files`; more than `max_bad` of the source raises UserError. A worker that dies is
    restarted, once a batch; then, or when no batch comes for `timeout_s` seconds, LoaderError names it. A record that
    takes a quarter of that is bad.
    """
    for name, value in {
        "batch": batch,
        "threads": threads,
        "frames": frames,
        "height": size[0],
        "width": size[1],
    }.items():
        if value < 1:
            raise UserError(f"the data needs {name} >= 1, got {name}={value}")
    for name, value in {"seed": seed, "start_step": start_step, "workers": workers}.items():
        if value < 0:
            raise UserError(f"the data needs {name} >= 0, got {name}={value}")
    for name, value in {"drop_caption": drop_caption, "max_bad": max_bad}.items():
        if not 0 <= value <= 1:
            raise UserError(f"the data needs {name} in [0, 1], got {name}={value}")
    if fps is not None and fps <= 0:
        raise UserError(f"the data needs fps > 0 (or None for every frame), got fps={fps}")
    clip = Clip(frames, size, fps, timeout_s * SHARE)
    bad = BadFiles(bad_files, names(source), clip.settings)
    for file, reason in source.skipped:
        bad.add(file, reason, "skipped")
    bad.check(max_bad)
    load = Load(source, clip, conditioner, drop_caption, seed, bad, max_bad)
    # Batched before it becomes an iterator: batching after it loses batches under mp_prefetch.
    first, end = rows or (0, batch)
    if not 0 <= first < end <= batch:
        raise UserError(f"rows {first} to {end} are not of a batch of {batch}")
    numbers = grain.MapDataset.range(2**62)  # sys.maxsize is rounded up past itself in batches of one
    if end - first < batch:
        numbers = numbers.map(functools.partial(_of_rows, batch, first, end - first))
    endless = numbers.map(load).batch(end - first)
    return Batches(endless, start_step, workers, threads, timeout_s, bad)


class Batches(Iterator[Batch]):
    """An iterator over `dataset[start_step:]` that restarts dead workers and never waits longer than `timeout_s`.

    `step` is the number of the next batch, `bad` the list of bad files, `restarts` how often a worker was replaced.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        start_step: int,
        workers: int,
        threads: int,
        timeout_s: float | int,
        bad: BadFiles,
    ):
        _parse_flags()
        self.dataset, self.step, self.workers, self.threads = dataset, start_step, workers, threads
        self.timeout_s, self.bad, self.restarts = timeout_s, bad, 0
        self._stream: _Stream | None = None
        self._restarted_at = -1

    def __next__(self) -> Batch:
        while True:
            self._stream = self._stream or _Stream(self.dataset[self.step :], self.step, self.workers, self.threads)
            item = self._stream.take(self.step, self.timeout_s)
            if not isinstance(item, Exception):
                self.step += 1
                # Copied out of grain's shared memory, which is then freed now and not whenever the batch dies.
                return jax.tree.map(np.array, item) if self.workers else item
            dead = self._stream.dead() if isinstance(item, RuntimeError) else ""
            if not dead and "terminated unexpectedly" in str(item):  # grain's words
                dead = "a starting worker"
            self._stream.kill()
            self.close()
            if not dead:
                raise item
            if self._restarted_at == self.step:
                raise LoaderError(
                    f"{dead} died twice while loading batch {self.step} ({item}); memory may be short, or a file "
                    "crashes the decoder; start again to continue"
                ) from item
            logging.getLogger(__name__).warning("%s died before batch %d; all workers are restarted", dead, self.step)
            self._restarted_at, self.restarts = self.step, self.restarts + 1

    def close(self) -> None:
        """Ends the workers. The next batch, if asked for, starts new ones."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _of_rows(batch: int, first: int, count: int, number: int) -> int:
    """The global sample number of the `number`th sample in rows `first` to `first + count` of every batch."""
    return int(number) // count * batch + first + int(number) % count


def _parse_flags() -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads its flags, also outside of an absl app


class _Stream:
    """One run of grain's iterator, in a thread of its own so that waiting for it can be given up.

    Workers write their process ids into a folder: grain does not say which process is which worker.
    """

    def __init__(self, dataset: grain.MapDataset, first: int, workers: int, threads: int):
        self.first, self.workers = first, workers
        self.folder = tempfile.TemporaryDirectory(prefix="vgjax-workers-")
        if workers:
            streams = [
                dataset.to_iter_dataset(ONE_AHEAD).mp_prefetch(
                    grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
                    worker_init_fn=functools.partial(_register, self.folder.name),
                )
            ]
        else:
            # Not grain's threads: the interpreter waits for those at its end, also for one that is stuck.
            streams = [dataset[k::threads].to_iter_dataset(IN_PLACE) for k in range(threads)]
        stop = threading.Event()
        self.ready: list[queue.Queue] = [queue.Queue(maxsize=1) for _ in streams]
        pumps = [
            threading.Thread(target=_pump, args=(stream, ready, stop), daemon=True)
            for stream, ready in zip(streams, self.ready, strict=True)
        ]
        # Also called at exit: a worker that does not answer would keep the interpreter from ending.
        self.pumps = pumps
        self.close = weakref.finalize(self, _end, stop, pumps, self.folder)
        for pump in pumps:
            pump.start()

    def take(self, step: int, timeout_s: float | int) -> PyTree:
        """The next element, or the exception that ended the stream."""
        deadline = time.monotonic() + timeout_s
        ready = self.ready[(step - self.first) % len(self.ready)]
        while True:
            try:
                return ready.get(timeout=max(0.0, min(1.0, deadline - time.monotonic())))
            except queue.Empty:
                if dead := self.dead():
                    return RuntimeError(f"{dead} ended without a word")
            if time.monotonic() >= deadline:
                # Slices are dealt in turn: batch k comes from worker k modulo their number.
                number = (step - self.first) % (self.workers or len(self.ready))
                pid = _pids(self.folder.name).get(number, "not started")
                who = f"worker {number} (process {pid})" if self.workers else f"thread {number}"
                return LoaderError(
                    f"batch {step} did not come from {who} within {timeout_s:g} s; start again to continue, "
                    "with a larger timeout_s if the storage is just slow"
                )

    def dead(self) -> str:
        """Names of the workers that are gone, empty if none."""
        alive = {process.pid for process in multiprocessing.active_children()}
        gone = [(number, pid) for number, pid in _pids(self.folder.name).items() if pid not in alive]
        return ", ".join(f"worker {number} (process {pid})" for number, pid in gone)

    def kill(self) -> None:
        """Ends the workers at once; `close` then waits for nobody."""
        _kill(self.folder.name)
        self.pumps.clear()


def _pump(stream: grain.IterDataset, ready: queue.Queue, stop: threading.Event) -> None:
    def put(item: PyTree) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    iterator = iter(stream)
    try:
        while not stop.is_set():
            put(next(iterator))
    except Exception as error:
        put(error)
    finally:
        iterator.close()


def _register(folder: str, worker: int, count: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the main process decides
    Path(folder, f"{worker}.tmp").write_text(str(os.getpid()))
    os.rename(Path(folder, f"{worker}.tmp"), Path(folder, str(worker)))


def _pids(folder: str) -> dict[int, int]:
    return {int(file.name): int(file.read_text()) for file in sorted(Path(folder).glob("*")) if file.suffix != ".tmp"}


def _kill(folder: str) -> None:
    alive = {process.pid for process in multiprocessing.active_children()}
    for pid in _pids(folder).values():
        if pid in alive:
            os.kill(pid, signal.SIGKILL)


def _end(stop: threading.Event, pumps: list[threading.Thread], folder: tempfile.TemporaryDirectory) -> None:
    stop.set()
    deadline = time.monotonic() + GRACE_S
    for pump in pumps:
        pump.join(max(0.0, deadline - time.monotonic()))
    _kill(folder.name)
    for pump in pumps:  # those whose worker is gone now end too: a thread may keep the interpreter from ending
        pump.join(0.5)
    folder.cleanup()


class Example(NamedTuple):
    """One record of a pass over a source: `array` uint8 video or f32 latent, or None and the `reason`."""

    id: int
    file: str
    caption: str
    array: np.ndarray | None
    reason: str | None


def examples(
    source: Source,
    *,
    frames: int = 1,
    size: tuple[int, int] = (1, 1),
    fps: float | int | None = None,
    threads: int = 2,
    timeout_s: float | int = 300.0,
    without: Collection[int] = (),
) -> Iterator[Example]:
    """Every record once, in order, but those `without`: first window, centre crop, full caption. Bad ones come with
    their reason.

    What the source skipped comes first, with id -1. A record that takes longer than a quarter of `timeout_s` is bad.
    """
    _parse_flags()
    for file, reason in source.skipped:
        yield Example(-1, file, "", None, reason)
    records = [record for record in range(len(source)) if record not in without]
    load = functools.partial(_example, source, Clip(frames, size, fps, timeout_s * SHARE), records)
    stream = _Stream(grain.MapDataset.range(len(records)).map(load), 0, 0, threads)
    try:
        for step in range(len(records)):
            item = stream.take(step, timeout_s)
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        stream.close()


def _example(source: Source, clip: Clip, records: list[int], place: int) -> Example:
    record = records[int(place)]
    try:
        array, caption = read(source, record, clip, None)
        return Example(record, source.name(record), caption, array, None)
    except Unreadable as error:
        return Example(record, source.name(record), "", None, str(error))
