"""Captions that an encoder has read: what it made of each, packed, and a set of them beside their clips' latents."""

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from vgjax.errors import UserError
from vgjax.typing import Context, Tokens

RECORDS, INDEX = "texts.array_record", "texts.json"
C, MASK = "c.", "mask."  # of a stream of this name


def pack(row: Context) -> bytes:
    """The text of one row (tokens `m e`, `vec` `p`) as bytes, without the zeros behind the last token of a stream."""
    arrays = {} if row.vec is None else {"vec": row.vec}
    for name, (c, mask) in row.text.items():
        real = mask.size - int(np.argmax(mask[::-1])) if mask.any() else 0
        arrays |= {f"{C}{name}": c[:real], f"{MASK}{name}": mask}
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def unpack(data: bytes) -> Context | None:
    """What was packed, or None where the bytes are no whole row."""
    try:
        with np.load(io.BytesIO(data)) as kept:
            names = [name.removeprefix(C) for name in kept if name.startswith(C)]
            streams = {name: (kept[f"{C}{name}"], kept[f"{MASK}{name}"]) for name in names}
            if "c" in kept:  # sets of before there could be several streams
                streams = {"text": (kept["c"], kept["mask"])}
            whole = {
                name: Tokens(np.pad(c, ((0, mask.size - len(c)), (0, 0))), mask) for name, (c, mask) in streams.items()
            }
            return Context(whole, kept["vec"] if "vec" in kept else None)
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
        return None


def row_of(rows: Context, i: int) -> Context:
    """One row of several."""
    return jax.tree.map(lambda leaf: leaf[i], rows)


def stacked(rows: Sequence[Context]) -> Context:
    """Rows side by side."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


class Embeddings:
    """A folder's encoded captions: captions -> rows of a Context."""

    def __init__(self, path: str | Path):
        from grain.sources import ArrayRecordDataSource  # here: grain takes a second to import

        self.path = Path(path)
        try:
            self.places: Mapping[str, int] = json.loads((self.path / INDEX).read_text())
            self.records = ArrayRecordDataSource(str(self.path / RECORDS))
            whole = len(self.records) == len(self.places)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path}: no encoded captions here ({error}); encode it again with the converted folder: vgjax.encode"
            ) from error
        if not whole:
            raise UserError(f"{path}: {INDEX} names {len(self.places)} captions, {RECORDS} has others; encode it again")

    def __call__(self, captions: Sequence[str]) -> Context:
        """What the encoders made of captions of the set, or of the empty one."""
        return stacked([self._row(caption) for caption in captions])

    def _row(self, caption: str) -> Context:
        row = unpack(self.records[self.places[caption]]) if caption in self.places else None
        if row is None:
            raise UserError(f"{self.path}: the caption {caption[:80]!r} is not among the encoded ones; encode it again")
        return row


class EmbeddingWriter:
    """Writes encoded captions into `folder`: `add(caption, text)`, then `close`."""

    def __init__(self, folder: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.folder, self.places = folder, {}
        self.writer = ArrayRecordWriter(str(folder / RECORDS), "group_size:1,uncompressed")

    def add(self, captions: Sequence[str], rows: Context) -> None:
        """Appends captions that are not there yet."""
        for i, caption in enumerate(captions):
            self.places[caption] = len(self.places)
            self.writer.write(pack(row_of(rows, i)))

    def close(self) -> None:
        """Ends the set."""
        self.writer.close()
        (self.folder / INDEX).write_text(json.dumps(self.places))
