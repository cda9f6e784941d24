"""Checkpoints that notice damage: Orbax writes the arrays, a sha256 manifest vouches for every byte of them.

    DIR/00000500/state/          the training state, written by Orbax
    DIR/00000500/meta.json       config, data position, versions
    DIR/00000500/manifest.json   size and sha256 of every other file, and of itself
    DIR/00000600.unfinished/     a save in flight, or one that was killed
    DIR/damaged/00000500/        a step that failed its manifest; never deleted

A save becomes a step by one rename, after its bytes, its manifest and its directories are on the disk:
  1. the state is copied off the devices (this blocks), then Orbax writes it in the background;
  2. every file is hashed and fsynced, then the manifest is written and fsynced;
  3. `.unfinished` is renamed away, and only then older steps are removed.
Orbax alone loads most flipped bits without a word (benchmarks/bitflips.py) and fsyncs neither metadata nor rename.
"""

import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from vgjax.data.storage import MANIFEST, fsync, reason, seal, sealed, verify, writing
from vgjax.errors import StorageError, UserError
from vgjax.parallel.distributed import agreed, first, streamed
from vgjax.typing import Json, PyTree

SUBDIR = "checkpoints"  # of a training workdir
STATE, META, DAMAGED = "state", "meta.json", "damaged"
UNFINISHED, REMOVED = ".unfinished", ".removed"
STEP = re.compile(r"\d{8,}")


class Checkpoints:
    """The steps in one directory: saved in the background, verified before they are read. One writer at a time."""

    def __init__(self, directory: str | os.PathLike, keep_last: int = 3, keep_every: int | None = None):
        assert keep_last >= 1 and (keep_every is None or keep_every >= 1), (keep_last, keep_every)
        self.directory = Path(directory).absolute()
        self.keep_last, self.keep_every = keep_last, keep_every
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        logging.getLogger("absl").addFilter(_is_news)
        self._pending: tuple[int, Future] | None = None
        with first():
            if jax.process_index() == 0:
                with writing(self.directory):
                    self.directory.mkdir(parents=True, exist_ok=True)
                    (self.directory / ".probe").touch()  # an unwritable directory is told now, not after the first save
                    (self.directory / ".probe").unlink()
                    self._sweep()

    def steps(self) -> list[int]:
        """Finished steps, oldest first; whether they are undamaged is known after `restore`."""
        return [int(folder.name) for folder in _folders(self.directory)]

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, state: PyTree, meta: Json, wait: bool = False) -> None:
        """Saves `state` as `step`; returns once the arrays are off the devices, so that they may be donated.

        Waits for the save before it and raises its StorageError if it failed.
        """
        self.finish()
        with writing(self._folder(step, UNFINISHED)):
            response = ocp.save_async(self._begin(step, meta) / STATE, state)
        self._pending = step, self._thread.submit(self._complete, response.result, step)
        if wait:
            self.finish()

    def stream(self, step: int, states: Iterable[Json], meta: Json) -> None:
        """Saves as `step` the nested dicts `states` merged into one, each written while the next is made.

        So no more than two of them need be in memory. They are not compressed, which would copy each once more.
        Returns once the step is finished; StorageError if it could not be written.
        """
        self.finish()
        with writing(self._folder(step, UNFINISHED)):
            target = self._begin(step, meta) / STATE
        for state in states:
            self.finish()
            self._pending = step, self._thread.submit(_add, target, state)
        self.finish()
        self._pending = step, self._thread.submit(self._complete, functools.partial(ocp.partial.finalize, target), step)
        self.finish()

    def _begin(self, step: int, meta: Json) -> Path:
        """The folder of a save in flight, with what it says of itself."""
        part = self._folder(step, UNFINISHED)
        text = json.dumps({**meta, "step": step, "versions": versions()}, indent=1)
        if jax.process_index() == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            (part / META).write_text(text)
        return part

    def finish(self) -> None:
        """Waits for the save in flight and raises StorageError if it failed. Call it before the process exits."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:  # Orbax and tensorstore raise many kinds; each of them means: not saved
            if jax.process_index() == 0:  # a full disk needs the room
                shutil.rmtree(self._folder(step, UNFINISHED), ignore_errors=True)
            why = f"step {step} was not saved to {self.directory}: {reason(error)}"
            raise StorageError(f"{why}; the steps saved before it are untouched") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self.finish()
        except StorageError as late:
            if error is None:
                raise
            _say(f"error: {late}")  # the error in flight came first, and goes on

    def restore(self, abstract: PyTree, step: int | None = None) -> tuple[PyTree, Json, int]:
        """The newest undamaged step (or `step`) as `(state, meta, step)`.

        `abstract` is a tree of ShapeDtypeStruct; their shardings may be others than those of the save (default: one
        device). Damaged newer steps are named on stderr and moved to `damaged/`. StorageError when no good step is
        left (then nothing is moved), UserError when the step's leaves are not exactly those of `abstract`.
        """
        # 1. nothing in flight, 2. verify every byte, 3. compare the leaves, 4. read onto the shardings asked for
        self.finish()
        chosen = agreed(lambda: self._choose(step))
        folder = self._folder(chosen)
        _compare(_leaves(ocp.metadata(folder / STATE).metadata), _leaves(abstract), folder)
        return _read(folder, abstract), json.loads((folder / META).read_text()), chosen

    def _choose(self, step: int | None) -> int:
        """The step to restore, after moving damaged newer ones aside."""
        folders = _folders(self.directory)[::-1] if step is None else [self._folder(step)]
        if not folders or not folders[0].is_dir():
            raise StorageError(f"no checkpoint {'' if step is None else f'of step {step} '}in {self.directory}")
        good, damaged = _newest_good(folders)
        if good is None:
            raise StorageError(f"no undamaged checkpoint in {self.directory}: {_told(damaged)}")
        for folder in damaged:
            names = (folder.name + (f"-{n}" if n else "") for n in itertools.count())
            aside = next(path for name in names if not (path := self.directory / DAMAGED / name).exists())
            with writing(aside):
                aside.parent.mkdir(exist_ok=True)
                folder.rename(aside)
            _say(f"{_told({folder: damaged[folder]})}; moved to {aside}, using step {int(good.name)}")
        return int(good.name)

    def _complete(self, written: Callable[[], object], step: int) -> None:
        """The background half of a save: wait for Orbax, vouch for the files, make it a step, remove old ones."""
        written()
        if jax.process_index() == 0:
            part, final, old = self._folder(step, UNFINISHED), self._folder(step), self._folder(step, REMOVED)
            seal(part)
            if final.exists():
                final.rename(old)
            part.rename(final)
            fsync(self.directory)
            shutil.rmtree(old, ignore_errors=True)
            for older in self.steps()[: -self.keep_last]:
                if self.keep_every is None or older % self.keep_every:
                    # Renamed first: a removal that is killed halfway must not look like a damaged step.
                    gone = self._folder(older).rename(self._folder(older, REMOVED))
                    shutil.rmtree(gone, ignore_errors=True)

    def _sweep(self) -> None:
        """Clears what a killed run left; a save that was killed between its manifest and its name is completed."""
        for folder in self.directory.glob(f"*{REMOVED}"):
            shutil.rmtree(folder)
        for folder in self.directory.glob(f"*{UNFINISHED}"):
            final = folder.with_name(folder.name.removesuffix(UNFINISHED))
            if sealed(folder) is not None and not final.exists():
                folder.rename(final)
            else:
                _say(f"removed {folder}: its save was killed before it was complete")
                shutil.rmtree(folder)

    def _folder(self, step: int, suffix: str = "") -> Path:
        return self.directory / f"{step:08d}{suffix}"


def load(
    path: str | os.PathLike,
    items: str | Sequence[str] | None = None,
    place: Callable[[Json, PyTree], PyTree] | None = None,
) -> tuple[PyTree, Json, int]:
    """Reads a checkpoint that describes itself: `(tree, meta, step)` of the newest undamaged step, on one device.

    `path` is a training workdir, its checkpoint directory or one step; `items` picks top-level entries of the state:
    `"ema"` gives that subtree, a sequence a dict of them, None the whole state; nothing else is read. `place`, of meta
    and the abstract tree, gives what of it to read, with its shardings. Structs and named tuples come back as dicts.
    Changes nothing on disk. UserError when there is nothing to read.
    """
    folder, wanted, meta = _stored(path, [items] if isinstance(items, str) else items)
    tree = _read(folder, place(meta, wanted) if place else wanted, partial=True)
    return (tree[items] if isinstance(items, str) else tree), meta, meta["step"]


def opened(path: str | os.PathLike, item: str) -> tuple[PyTree, Callable[[str], np.ndarray], Json]:
    """What `load` would give of one entry, leaf by leaf: `(abstract tree, what reads the leaf of a path, meta)`."""
    folder, wanted, meta = _stored(path, [item])
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(wanted[item])}

    def read(leaf: str) -> np.ndarray:
        # Orbax reads numpy's for numpy's, with a copy less than for JAX's.
        like = np.broadcast_to(np.zeros((), leaves[leaf].dtype), leaves[leaf].shape)
        tree = functools.reduce(lambda inner, name: {name: inner}, reversed([item, *leaf.split("/")]), like)
        return jax.tree.leaves(_load(folder, tree, partial=True))[0]

    return wanted[item], read, meta


def _stored(path: str | os.PathLike, items: Sequence[str] | None) -> tuple[Path, dict[str, PyTree], Json]:
    """The newest undamaged step, the abstract entries of its state that are asked for, and its meta."""
    folder = newest(path)
    stored = ocp.metadata(folder / STATE).metadata
    names = list(stored) if items is None else list(items)
    if absent := sorted(set(names) - set(stored)):
        raise UserError(f"checkpoint {folder} has no {', '.join(absent)}; it has {', '.join(sorted(stored))}")
    # The device that a leaf was saved from may be another process's.
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(stored))
    return folder, {name: wanted[name] for name in names}, json.loads((folder / META).read_text())


def meta(path: str | os.PathLike) -> Json:
    """What the newest undamaged step says of itself. For its arrays too, ask `newest` once and give both its answer."""
    return json.loads((newest(path) / META).read_text())


def workdir_of(path: str | os.PathLike) -> Path:
    """The training workdir of what `load` accepts: a workdir, its checkpoint directory or one step."""
    return _located(Path(path).absolute())[0]


def steps_at(path: str | os.PathLike) -> list[Path]:
    """The steps of what `load` accepts, the newest first, undamaged or not; none where there is nothing of the kind."""
    path = Path(path).absolute()
    return _located(path)[1] if path.is_dir() else []


def _located(path: Path) -> tuple[Path, list[Path]]:
    """(training workdir, steps, the newest first) of what `load` accepts, by what lies there.

    The names above it say nothing: a run may itself lie in a folder named `checkpoints`.
    """
    if not path.is_dir():
        return path, []
    if (path / SUBDIR).is_dir():
        return path, _folders(path / SUBDIR)[::-1]
    if any((path / name).exists() for name in (MANIFEST, META, STATE)):
        root, folders = path.parent.parent if path.parent.name == DAMAGED else path.parent, [path]
    else:
        root, folders = path, _folders(path)[::-1]
    held = root.name == SUBDIR and (folders or list(root.glob(f"*{UNFINISHED}")))
    return (root.parent if held else path), folders


def versions() -> dict[str, str]:
    """What a result was computed with."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
    return {"python": sys.version.split()[0], **packages}


def digest(tree: PyTree) -> str:
    """sha256 over path, dtype, shape and bytes of every leaf: equal digests mean bit-identical states."""
    total = hashlib.sha256()
    named = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    paths = sorted(named)
    for path, parts in zip(paths, streamed([named[path] for path in paths]), strict=True):
        total.update(f"{path} {np.dtype(named[path].dtype).name} {named[path].shape} ".encode())
        for part in parts:
            total.update(part.tobytes())
    return total.hexdigest()


def newest(path: str | os.PathLike) -> Path:
    """The newest undamaged step at `path`, or a sentence about what lies there instead.

    In a job all processes ask together: process 0 verifies and tells the others. What it has verified it does not read
    again while the files stay the same.
    """
    path = Path(path).absolute()
    return Path(agreed(lambda: str(_newest(path))))


def _newest(path: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"no checkpoint at {path}: it {'is a file' if path.exists() else 'does not exist'}")
    _, folders = _located(path)
    if not folders:
        root = path / SUBDIR if (path / SUBDIR).is_dir() else path
        found = sorted(entry.name for entry in root.iterdir())
        if any(name.endswith(UNFINISHED) for name in found):
            raise UserError(f"{root} holds only an unfinished save: its run stopped before the first one was complete")
        raise UserError(
            f"{root} holds no vgjax checkpoint ({', '.join(found[:4]) or 'it is empty'}); give a training "
            f"workdir, its {SUBDIR} directory or one step in it"
        )
    good, damaged = _newest_good(folders, lambda folder: list(_verified(folder, _stamp(folder))))
    if good is None:
        raise StorageError(f"no undamaged checkpoint at {path}: {_told(damaged)}")
    if damaged:
        _say(f"{_told(damaged)}; using step {int(good.name)}")
    return good


def _newest_good(
    folders: list[Path], verify: Callable[[Path], list[str]] = verify
) -> tuple[Path | None, dict[Path, list[str]]]:
    """The first folder without a fault, and the faults of those before it."""
    damaged = {}
    for folder in folders:
        faults = verify(folder)
        if not faults:
            return folder, damaged
        damaged[folder] = faults
    return None, damaged


@functools.lru_cache(64)
def _verified(folder: Path, stamp: tuple[tuple[object, ...], ...]) -> tuple[str, ...]:
    """The faults of a step whose files are those of `stamp`."""
    return tuple(verify(folder))


def _stamp(folder: Path) -> tuple[tuple[object, ...], ...]:
    """What changes when a file of the folder is written, replaced or removed."""
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple((path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in found)


def _is_news(record: logging.LogRecord) -> bool:
    """Orbax logs what a thread of it raises, with a traceback for each thread that waits; `finish` says it once."""
    return not (record.exc_info and record.pathname.endswith("orbax/checkpoint/_src/futures/future.py"))


def _add(target: Path, state: Json) -> None:
    context = ocp.Context()
    context.array.saving.use_compression = False
    with context:
        ocp.partial.save(target, state)


def _read(folder: Path, abstract: PyTree, partial: bool = False) -> PyTree:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def placed(leaf: PyTree) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here)

    tree = _load(folder, jax.tree.map(placed, abstract), partial)
    # Orbax hands back the abstract leaf for what it did not find.
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(tree)), f"leaves of {folder} were not read"
    return tree


def _load(folder: Path, abstract: PyTree, partial: bool) -> PyTree:
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    with context:
        return ocp.load(folder / STATE, abstract)


def check_leaves(tree: PyTree, abstract: PyTree, path: str | os.PathLike) -> None:
    """UserError naming the leaves of `tree`, read from `path`, that are not exactly those of `abstract`."""
    _compare(_leaves(tree), _leaves(abstract), Path(path))


def _compare(stored: dict[str, str], wanted: dict[str, str], folder: Path) -> None:
    faults = [
        f"{path} is {stored.get(path, 'missing')} in the checkpoint and {wanted.get(path, 'missing')} in this run"
        for path in sorted(stored.keys() | wanted.keys())
        if stored.get(path) != wanted.get(path)
    ]
    if faults:
        more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise UserError(
            f"checkpoint {folder} does not fit: {'; '.join(faults[:5])}{more}; restore it with the config "
            f"it was saved with, or start in another workdir"
        )


def _leaves(tree: PyTree) -> dict[str, str]:
    return {
        _name(path): f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _name(path: tuple[object, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _folders(directory: Path) -> list[Path]:
    found = (entry for entry in directory.iterdir() if STEP.fullmatch(entry.name) and entry.is_dir())
    return sorted(found, key=lambda entry: int(entry.name))


def _told(damaged: dict[Path, list[str]]) -> str:
    return "; ".join(f"checkpoint {folder} is damaged: {', '.join(faults[:3])}" for folder, faults in damaged.items())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
