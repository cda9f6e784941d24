"""Where records come from: a folder of videos and images, or an ArrayRecord set of precomputed latents.

A source has a `kind` (the key of its arrays in a batch), a length, names of its records, and `load`. Files that it
knows to be useless are in `skipped`, with their reasons; what turns out bad on reading raises `Unreadable`.
"""

import functools
import hashlib
import json
import os
import queue
import shutil
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from vgjax.data.decode import IMAGES, VIDEOS, TooSlow, Unreadable, read_clip
from vgjax.data.embeddings import EmbeddingWriter
from vgjax.data.storage import reason
from vgjax.errors import UserError
from vgjax.typing import Context, Json


class Bad(NamedTuple):
    """A file that gives nothing, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Clip:
    """The part of a video to read: frames, (height, width) in pixels, frames per second (None: every frame).

    Reading it may take `seconds`, if given.
    """

    frames: int
    size: tuple[int, int]
    fps: float | int | None = None
    seconds: float | int | None = None

    @property
    def settings(self) -> Json:
        """What decides whether a file gives such a clip, as JSON."""
        return {"frames": self.frames, "size": list(self.size), "fps": self.fps}


@runtime_checkable
class Source(Protocol):
    """A numbered set of captioned records."""

    kind: str  # "video" or "latent"
    path: Path
    skipped: list[Bad]

    def __len__(self) -> int: ...

    def name(self, record: int) -> str:
        """What the list of bad files calls a record; starts with `path`."""

    def load(self, record: int, clip: Clip | None, rng: np.random.Generator | None) -> tuple[np.ndarray, str]:
        """The array and the caption of a record; raises Unreadable."""


def read(source: Source, record: int, clip: Clip, rng: np.random.Generator | None) -> tuple[np.ndarray, str]:
    """`source.load`, whose every failure is Unreadable and that takes no longer than `clip.seconds`: then TooSlow.

    It runs in a thread of its own, left behind when it is late: nothing else can end a call that hangs in the storage
    or in the decoder. A decoder that still gets packets looks at its deadline and ends by itself.
    """
    results: queue.SimpleQueue = queue.SimpleQueue()

    def load() -> None:
        try:
            results.put(source.load(record, clip, rng))
        except Exception as error:
            results.put(error)

    threading.Thread(target=load, daemon=True).start()
    try:
        result = results.get(timeout=clip.seconds)
    except queue.Empty:
        result = TooSlow()
    if isinstance(result, TooSlow):
        raise TooSlow(f"takes longer than {clip.seconds:g} s to read") from None
    if isinstance(result, Unreadable):
        raise result
    if isinstance(result, Exception):
        raise Unreadable(f"can't be read: {type(result).__name__}: {reason(result)}") from result
    return result


class Folder:
    """Videos and images under `path` with `captions.jsonl` ({"video", "caption"} a line), or a `.txt` beside each file.

    A file may have several lines, each is a record. Files in neither place are skipped, or have the empty caption where
    none are needed (`captioned=False`); lines that name a missing file are skipped. Records are ordered by line, then
    by name.
    """

    kind = "video"

    def __init__(self, path: str | Path, captioned: bool = True):
        self.path, self.captioned = Path(path), captioned
        if not self.path.is_dir():
            raise UserError(f"{path}: no such folder of videos")
        files = sorted(_found(self.path))
        self.skipped: list[Bad] = []
        self.records: list[tuple[str, str]] = []
        listed = set()
        if (self.path / "captions.jsonl").exists():
            for video, caption in _captions(self.path / "captions.jsonl"):
                listed.add(_true(self.path / video))
                self._add(self.path / video, caption)
        for file in files:
            if _true(file) not in listed:
                self._add(file, _beside(file))
        if not files and not self.records:
            raise UserError(f"{path}: the folder holds no videos or images ({' '.join(VIDEOS + IMAGES)})")
        if not self.records:
            file, reason = self.skipped[0]
            raise UserError(f"{path}: none of {len(self.skipped)} files can be used; the first, {file}: {reason}")

    def _add(self, file: Path, caption: str | None) -> None:
        if not file.is_file():
            self.skipped.append(Bad(str(file), "there is no such file, though captions.jsonl or a link names it"))
        elif not caption and self.captioned:
            self.skipped.append(Bad(str(file), "no caption"))
        else:
            self.records.append((str(file), caption or ""))

    def stamp(self) -> str:
        """sha256 of all records as they are on the disk: name, size, time of the last change, caption."""
        total = hashlib.sha256()
        for file, caption in self.records:
            stat = os.stat(file)
            name = os.path.relpath(file, self.path)
            total.update(json.dumps([name, stat.st_size, stat.st_mtime_ns, caption]).encode())
        return total.hexdigest()

    def __len__(self) -> int:
        return len(self.records)

    def name(self, record: int) -> str:
        return self.records[record][0]

    def content(self, record: int) -> str:
        """sha256 of the bytes of a record's file."""
        with open(self.records[record][0], "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def load(self, record: int, clip: Clip, rng: np.random.Generator | None) -> tuple[np.ndarray, str]:
        file, caption = self.records[record]
        return read_clip(file, clip.frames, clip.size, clip.fps, rng, clip.seconds), caption


def _found(root: Path) -> Iterator[Path]:
    """Videos and images under a folder; links are followed, each folder once, whatever leads to it."""
    seen = set()
    for folder, inner, files in os.walk(root, followlinks=True):
        true = os.path.realpath(folder)
        if true in seen:
            inner.clear()
            continue
        seen.add(true)
        inner[:] = sorted(name for name in inner if not name.startswith("."))  # half-written files are hidden
        for name in files:
            if not name.startswith(".") and name.lower().endswith(VIDEOS + IMAGES):
                yield Path(folder, name)


def _true(file: Path) -> str:
    """One name for a file, by whatever linked folder it is reached."""
    return os.path.join(_true_folder(str(file.parent)), file.name)


_true_folder = functools.lru_cache(maxsize=1024)(os.path.realpath)


def _beside(file: Path) -> str | None:
    text = file.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _captions(path: Path) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line.decode("utf-8-sig"))
                video, caption = entry["video"], entry["caption"]
                if not (isinstance(video, str) and isinstance(caption, str)):
                    raise TypeError("both must be strings")
                if os.path.isabs(video) or ".." in Path(video).parts:
                    raise ValueError("the name of a video is one inside this folder; a link there may lead out of it")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f'{path}:{number}: expected one {{"video": "name.mp4", "caption": "..."}} a line, got '
                    f"{line[:80].decode(errors='replace').strip()!r} ({type(error).__name__}: {error})"
                ) from error
            yield video, caption.strip()


def summary(source: Source) -> str:
    """What a source found, in one line: clips, images, and how many were skipped for which reason."""
    kinds = Counter("image" if source.name(i).lower().endswith(IMAGES) else "clip" for i in range(len(source)))
    if source.kind == "latent":
        kinds = Counter(latent=len(source))
    found = ", ".join(f"{count} {kind}{'s' * (count != 1)}" for kind, count in sorted(kinds.items()))
    reasons = Counter(bad.reason for bad in source.skipped)
    skipped = "; ".join(f"{count} skipped: {reason}" for reason, count in reasons.most_common())
    return f"{source.path}: {found}" + (f"; {skipped}" if skipped else "")


class Latents:
    """Latents written by `LatentWriter`: f32 `t h w c` and captions; `meta` says which VAE made them."""

    kind = "latent"

    def __init__(self, path: str | Path):
        from grain.sources import ArrayRecordDataSource  # here: grain takes a second to import

        self.path, self.skipped = Path(path), []
        try:
            self.meta: Json = json.loads((self.path / "meta.json").read_text())
            self.records = ArrayRecordDataSource(str(self.path / "latents.array_record"))
            found = len(self.records)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: no finished set of latents here ({error}); write one: vgjax.encode") from error
        if found != self.meta["count"]:
            promised = self.meta["count"]
            raise UserError(f"{path}: meta.json promises {promised} latents, the file holds {found}; encode again")

    def __len__(self) -> int:
        return self.meta["count"]

    def name(self, record: int) -> str:
        return f"{self.path / 'latents.array_record'}#{record}"

    def load(
        self, record: int, clip: Clip | None = None, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, str]:
        try:
            head, packed = self._head(record)
            latent = np.frombuffer(packed, "<f4").reshape(self.meta["shape"])
        except (RuntimeError, ValueError, struct.error, KeyError) as error:
            raise Unreadable(f"the record is damaged: {error}") from error
        return latent, head["caption"]

    def contents(self) -> dict[str, int]:
        """Of the bytes of each clip (sha256) the record that was made of them; sets of old say nothing of it."""
        heads = (self._head(record)[0] for record in range(len(self)))
        return {head["content"]: record for record, head in enumerate(heads) if head.get("content")}

    def _head(self, record: int) -> tuple[Json, bytes]:
        packed = self.records[record]
        (size,) = struct.unpack_from("<I", packed)
        return json.loads(packed[4 : 4 + size]), packed[4 + size :]


class LatentWriter:
    """Writes latents as ArrayRecord: `with LatentWriter(path, meta) as writer: writer.add(latent, caption, id)`.

    Everything goes to a folder beside `path` that takes its name only when all is written; an exception leaves nothing
    (with `replace`: what was there). A record is a length, a JSON head with caption, id and the sha256 of the clip's
    file, and the raw floats. `meta` must be JSON (the VAE's config). Captions that an encoder has read are added by
    `add_texts`, for `Embeddings`.
    """

    def __init__(self, path: str | Path, meta: Json, replace: bool = False):
        self.path, self.meta, self.replace = Path(path), meta, replace
        self.count, self.shape, self.texts = 0, None, None
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        if self.path.exists() and not replace:
            raise UserError(f"{path}: already there; delete it or choose another place for the latents")

    def __enter__(self) -> "LatentWriter":
        from array_record.python.array_record_module import ArrayRecordWriter

        try:
            self.temporary.mkdir(parents=True)
            self.writer = ArrayRecordWriter(str(self.temporary / "latents.array_record"), "group_size:1,uncompressed")
        except (OSError, RuntimeError) as error:
            raise UserError(f"{self.path}: latents can't be written here ({error})") from error
        return self

    def add(self, latent: Float[np.ndarray, "t h w c"], caption: str, id: int, content: str = "") -> None:
        """Appends one record; all must have one shape."""
        self.shape = self.shape or latent.shape
        if latent.shape != self.shape:
            raise UserError(f"{self.path}: latents of one set have one shape, got {latent.shape} after {self.shape}")
        head = json.dumps({"caption": caption, "id": int(id), "content": content}).encode()
        self.writer.write(struct.pack("<I", len(head)) + head + np.ascontiguousarray(latent, "<f4").tobytes())
        self.count += 1

    def add_texts(self, captions: Sequence[str], rows: Context) -> None:
        """Appends encoded captions that are not there yet."""
        self.texts = self.texts or EmbeddingWriter(self.temporary)
        self.texts.add(captions, rows)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self.writer.close()
            if self.texts:
                self.texts.close()
            if kind is None and self.count:
                meta = {"meta": self.meta, "shape": self.shape, "count": self.count}
                (self.temporary / "meta.json").write_text(json.dumps(meta, indent=1))
                if self.replace and self.path.exists():
                    old = self.temporary.with_suffix(".old")
                    os.rename(self.path, old)
                    os.rename(self.temporary, self.path)
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    os.rename(self.temporary, self.path)
        except (OSError, RuntimeError) as problem:
            raise UserError(f"{self.path}: latents can't be written here ({problem})") from problem
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if kind is None and not self.count:
            raise UserError(f"{self.path}: there is not one latent to write")
