"""From a record number to a training sample; every random choice is drawn from (seed, sample index) alone."""

import fcntl
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from grain.transforms import Map
from jaxtyping import Int64

from vgjax.data.decode import TooSlow, Unreadable
from vgjax.data.embeddings import row_of
from vgjax.data.sources import Clip, Source, read
from vgjax.errors import UserError
from vgjax.typing import Context, Json


class BadFiles:
    """The list of files that gave nothing: one {"file", "reason", "settings", "kind"} a line, shared by processes.

    Entries of other `settings` (of the clips that were asked for) do not count; None counts all. `path=None` keeps the
    list in memory. With the `names` of a source only its files count: sources may share a list. `slow` are the files
    that took too long: nobody should wait for them again. The file is only appended to, and only its new end is read.
    """

    def __init__(self, path: str | Path | None, names: frozenset[str] | None = None, settings: Json | None = None):
        self.path, self.names, self.settings = path and Path(path), names, settings
        self.known: dict[str, str] = {}
        self.slow: set[str] = set()
        self._listed: set[tuple[str, str]] = set()
        self._read = 0  # bytes of the list

    def add(self, file: str, reason: str, kind: str = "") -> None:
        """Lists a file, unless it is there; safe against other processes and against lines cut off by a kill.

        `kind` is "skipped" for what the source does not even try, which only the next look at the source can tell, and
        "slow".
        """
        if file in self.known and (kind != "slow" or file in self.slow):
            return
        self._count(file, reason, kind)
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as lines:
                fcntl.flock(lines, fcntl.LOCK_EX)
                rest = self._refresh(lines)
                if (file, kind) not in self._listed:
                    entry = {"file": file, "reason": reason}
                    entry |= {"settings": self.settings} if self.settings is not None else {}
                    entry |= {"kind": kind} if kind else {}
                    lines.write((b"\n" if rest else b"") + json.dumps(entry).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self.path}: the list of bad files can't be written ({error.strerror})") from error

    def _refresh(self, lines: BinaryIO) -> bool:
        """Takes in the lines that were written since the last look; whether the last one is cut off."""
        if os.fstat(lines.fileno()).st_size < self._read:  # another list by now
            self._read, self._listed = 0, set()
        lines.seek(self._read)
        whole, newline, rest = lines.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        for entry in _parse(whole):
            if self.settings is None or entry.get("settings") == self.settings:
                file, kind = entry["file"], entry.get("kind", "")
                self._listed.add((file, kind))
                if self.names is None or (file in self.names and kind != "skipped"):
                    self._count(file, entry["reason"], kind)
        return bool(rest)

    def _count(self, file: str, reason: str, kind: str) -> None:
        self.known.setdefault(file, reason)
        if kind == "slow":
            self.slow.add(file)

    def entries(self) -> dict[str, str]:
        """File -> reason, in the order of discovery."""
        if self.path is not None and self.path.exists():
            with open(self.path, "rb") as lines:
                self._refresh(lines)
        return self.known

    @property
    def count(self) -> int:
        return len(self.entries())

    def share(self, total: int | None = None) -> float:
        """Bad files as a share of `total`, or of the source's files."""
        return self.count / max(1, len(self.names or ()) if total is None else total)

    def check(self, allowed: float | int) -> None:
        """Raises UserError when more than the allowed share of the source's files is bad."""
        bad, total = self.entries(), len(self.names or ())
        if len(bad) > allowed * total:
            file, reason = next(iter(bad.items()))
            where = f"; the list is {self.path}, delete it to have mended files tried again" if self.path else ""
            raise UserError(
                f"{len(bad)} of {total} files are bad, more than the allowed share of {allowed:g}; "
                f"the first is {file}: {reason}{where}"
            )


def _parse(text: bytes) -> Iterator[Json]:
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            if isinstance(entry["file"], str) and isinstance(entry["reason"], str):
                yield entry
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill


ORDER, DROP, READ = 1, 2, 3  # what a random stream is for: streams of (seed, purpose, number) never coincide


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, " count"]:
    """The order of an epoch. (grain's shuffle takes 4.5 ms a record for five files, 0.3 ms for a hundred.)"""
    return np.random.default_rng((seed, ORDER, epoch)).permutation(count)


@dataclass
class Load(Map):
    """Sample index -> sample: array, index, id, and the row of its Context that `conditioner` makes of a caption.

    A bad record is replaced by the next good one. The replacement depends on nothing but the files, so a sample stays
    a function of (seed, index).
    """

    source: Source
    clip: Clip
    conditioner: Callable[[Sequence[str]], Context] | None
    drop_caption: float | int
    seed: int
    bad: BadFiles
    max_bad: float | int

    def map(self, index: int) -> Json:
        index, count = int(index), len(self.source)
        epoch, place = divmod(index, count)
        first = int(order(self.seed, epoch, count)[place])
        dropped = np.random.default_rng((self.seed, DROP, index)).random() < self.drop_caption
        for attempt in range(count):
            number = (first + attempt) % count
            if self.source.name(number) in self.bad.slow:
                continue
            rng = np.random.default_rng((self.seed, READ, index, attempt))
            try:
                array, caption = read(self.source, number, self.clip, rng)
            except Unreadable as error:
                kind = "slow" if isinstance(error, TooSlow) else ""
                self.bad.add(self.source.name(number), str(error), kind)
                self.bad.check(self.max_bad)
                continue
            sample = {self.source.kind: array, "index": np.uint32(index % 2**32), "id": np.int32(number)}
            if self.conditioner is None:
                return sample
            return sample | {"context": row_of(self.conditioner(["" if dropped else caption]), 0)}
        raise UserError(f"{self.source.path}: not one of {count} records can be read; see {self.bad.path}")


def names(source: Source) -> frozenset[str]:
    """The distinct files of a source, the skipped ones included."""
    return frozenset([source.name(i) for i in range(len(source))] + [bad.file for bad in source.skipped])
