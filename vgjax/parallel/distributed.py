"""Several processes as one job: how they find each other, agree, stop together and never hang.

A launcher says where the job is: VGJAX_COORDINATOR=host:port, VGJAX_PROCESSES and VGJAX_PROCESS, or
VGJAX_COORDINATOR=auto where JAX finds that out by itself (TPU pods, SLURM, GKE, MPI). Without it a process is alone.
"""

import faulthandler
import hashlib
import itertools
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vgjax import errors
from vgjax.errors import CRASH, HUNG, PeerLost, UserError
from vgjax.typing import Json, PyTree

T = TypeVar("T")

VARIABLES = ("VGJAX_COORDINATOR", "VGJAX_PROCESSES", "VGJAX_PROCESS")
HEARTBEAT = 30  # seconds of silence after which a process counts as dead
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|unavailable|coordination service|preempted", re.IGNORECASE)
GATHERED = 2**28  # bytes that `fetch` holds on a device at a time; one program for many leaves compiles sooner
PATIENCE = 20  # times the watchdog's limit, for what takes long without being stuck
LAST_WORDS = 1.0  # seconds that process 0, on which the others hang, lets them print why they end


def join() -> None:
    """Joins the job that the environment describes, before JAX touches a device; alone, does nothing."""
    where, count, own = (os.environ.get(name, "") for name in VARIABLES)
    if not where:
        return
    if where == "auto":
        _initialize()
        return
    if not (":" in where and count.isdigit() and own.isdigit() and int(own) < int(count)):
        given = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in VARIABLES)
        raise UserError(f"{given}: write host:port, the number of processes, and this one's from 0 on")
    _initialize(where, int(count), int(own))


def single(program: str) -> None:
    """A `UserError` where a launcher started several processes of a program that is one."""
    if os.environ.get(VARIABLES[0]):
        raise UserError(
            f"{program} runs in one process, but VGJAX_COORDINATOR says that this is one of a job: start it by itself, "
            "on one machine that sees the shared disk"
        )


def _initialize(*where: object) -> None:
    told = f"VGJAX_COORDINATOR={':'.join(map(str, where[:1])) or 'auto'}"
    try:
        jax.distributed.initialize(*where, heartbeat_timeout_seconds=HEARTBEAT)
    except ValueError as error:
        raise UserError(
            f"{told}: JAX does not find the job by itself here ({_first(error)}): name host:port"
        ) from error
    except RuntimeError as error:
        raise PeerLost(f"{told}: not all processes of the job came together: {_first(error)}") from error
    _fail_alone()


def _fail_alone() -> None:
    """A failed process of a job ends at once: a clean exit waits for all others, which wait for it."""

    def leave(code: int) -> None:
        errors.record(code)
        sys.stdout.flush()
        sys.stderr.flush()
        if jax.process_index() == 0:
            time.sleep(LAST_WORDS)
        os._exit(code)

    def crash(*error: object) -> None:
        sys.__excepthook__(*error)
        leave(CRASH)

    if jax.process_count() > 1:
        errors.leave, sys.excepthook = leave, crash


@contextmanager
def peers() -> Iterator[None]:
    """Around steps: an error that comes of another process's end is said as that, with a code that restarts."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1 and LOST.search(str(error)):
            raise PeerLost(
                f"process {jax.process_index()} lost another process of the job, see their output: {_first(error)}"
            ) from error
        raise


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def say(text: str) -> None:
    """Prints for the whole job: process 0 does."""
    if jax.process_index() == 0:
        print(text, flush=True)


def note(text: str) -> None:
    """A note on stderr, for the whole job: process 0 gives it."""
    if jax.process_index() == 0:
        print(f"note: {text}", file=sys.stderr, flush=True)


def peak() -> str:
    """The most memory that host and devices held so far."""
    said = [f"host {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"]
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    if used := [stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats]:
        said.append(f"a device {max(used) / 2**30:.1f} GiB")
    return "peak memory: " + ", ".join(said)


def preflight(config: Json, versions: dict[str, str], mesh: Mesh) -> str:
    """One line on devices, mesh and versions; UserError where a process has other code or config than the first."""
    flags = {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    devices = {"local devices": jax.local_device_count(), "compiler flags": flags}
    said = {"config": config, "code": code(), "versions": versions, **devices}
    digests = [
        hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).digest()[:8] for part in said.values()
    ]
    if jax.process_count() > 1:
        own = np.frombuffer(b"".join(digests), np.uint32).reshape(len(said), 2)
        seen = np.asarray(multihost_utils.process_allgather(own))
        for i, part in enumerate(said):
            other = [process for process in range(len(seen)) if (seen[process, i] != seen[0, i]).any()]
            if other:
                raise UserError(
                    f"process {other[0]} has another {part} than process 0 ({len(other)} of {len(seen)} differ): start "
                    "the same commit, environment and command everywhere"
                )
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{mesh.size} {'/'.join(kinds)} in {jax.process_count()} process(es), mesh {sizes}; {packages}"


def code() -> str:
    """sha256 of the package's own sources."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        total.update(file.read_bytes())
    return total.hexdigest()


@contextmanager
def first() -> Iterator[None]:
    """Process 0 goes through the block before the others: for what is made once on a shared disk."""
    if jax.process_index() > 0:
        multihost_utils.sync_global_devices("first")
        yield
        return
    yield
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first")


def agreed(decide: Callable[[], T]) -> T:
    """What process 0 decides, as JSON has it, on all processes of the job, which call this together.

    A `UserError` of its decision is raised on all of them, so that the job ends with one exit code.
    """
    if jax.process_count() == 1:
        return decide()
    said = b""
    if jax.process_index() == 0:
        try:
            answer = {"value": decide()}
        except UserError as error:
            answer = {"kind": type(error).__name__, "error": str(error)}
        said = json.dumps(answer).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
    padded = np.frombuffer(said.ljust(size, b"\0"), np.uint8)
    answer = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    if "error" in answer:
        raise getattr(errors, answer["kind"])(answer["error"])
    return answer["value"]


class Stop:
    """Whether the scheduler asked to stop (SIGTERM): in a job all processes hear of it and agree on one step."""

    def __init__(self) -> None:
        self.event = threading.Event()
        if jax.process_count() == 1:  # else JAX's coordination service holds the signal
            signal.signal(signal.SIGTERM, lambda *_: self.event.set())

    def after(self, step: int) -> bool:
        """True after the step that all processes save; to be asked at every step."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.event.set()
        return self.event.is_set()


class Watchdog:
    """Ends a process that does nothing for `limit` seconds (0: never): prints every stack and exits with HUNG.

    A process that waits for a dead or stuck one does nothing either, so the whole job ends and can be restarted.
    Compiling, sampling and saving may take `PATIENCE` times as long.
    """

    def __init__(self, limit: float | int):
        self.limit, self.last, self.paused = limit, time.monotonic(), 0
        if limit:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """A step is done."""
        self.last = time.monotonic()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what may take long without being stuck: compiling, sampling, saving."""
        self.beat()
        self.paused += 1
        try:
            yield
        finally:
            self.beat()
            self.paused -= 1

    def _watch(self) -> None:
        while True:
            time.sleep(min(0.25, self.limit / 4))
            limit = self.limit * (PATIENCE if self.paused else 1)
            if time.monotonic() - self.last > limit:
                where = f"process {jax.process_index()} of {jax.process_count()}"
                print(f"error: {where} did nothing for {limit:g} s; its stacks:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                errors.leave(HUNG) if jax.process_count() > 1 else os._exit(HUNG)


def fetch(tree: PyTree) -> PyTree:
    """The tree as numpy arrays on every process, wherever its parts lie."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, gathered(leaves))


def gathered(leaves: Sequence[PyTree]) -> Iterator[np.ndarray]:
    """The leaves in order as numpy arrays on every process, at most `GATHERED` bytes of them at a time."""
    ready: dict[int, PyTree] = {}
    for i, leaf in enumerate(leaves):
        if i not in ready and not _near(leaf):
            far = [j for j in range(i, len(leaves)) if not _near(leaves[j])]
            sizes = itertools.accumulate(leaves[j].nbytes for j in far)
            some = [j for j, size in zip(far, sizes, strict=True) if j == i or size <= GATHERED]
            everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
            whole = jax.jit(lambda arrays: arrays, out_shardings=everywhere)([leaves[j] for j in some])
            ready.update(zip(some, whole, strict=True))
        yield np.asarray(ready.pop(i, leaf))


def streamed(leaves: Sequence[PyTree]) -> Iterator[Iterable[np.ndarray]]:
    """What `gathered` gives, but a leaf of more than `GATHERED` bytes in parts: its rows in order, some at a time."""
    large = [not _near(leaf) and leaf.nbytes > GATHERED for leaf in leaves]
    small = gathered([leaf for leaf, is_large in zip(leaves, large, strict=True) if not is_large])
    for leaf, is_large in zip(leaves, large, strict=True):
        yield _parts(leaf) if is_large else [next(small)]


def _parts(leaf: jax.Array) -> Iterator[np.ndarray]:
    row = leaf.nbytes // leaf.shape[0]
    count = max(1, GATHERED // row)
    for start in range(0, leaf.shape[0], count):
        rows = slice(start, min(start + count, leaf.shape[0]))
        part = np.zeros((rows.stop - rows.start, *leaf.shape[1:]), leaf.dtype)
        for shard in leaf.addressable_shards:
            first, end, _ = shard.index[0].indices(leaf.shape[0])
            low, high = max(first, rows.start), min(end, rows.stop)
            if shard.replica_id == 0 and low < high:
                part[low - rows.start : high - rows.start, *shard.index[1:]] = shard.data[low - first : high - first]
        # As a sum of what each process has, the rest being zeros; of bytes, for -0.0 + 0.0 is another number.
        whole = multihost_utils.broadcast_one_to_all(np.frombuffer(part.tobytes(), np.uint8), is_source=True)
        yield np.asarray(whole).view(leaf.dtype)


def _near(leaf: PyTree) -> bool:
    return getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated
