"""Captions that an encoder has read: what it made of each, packed, and a set of them beside their clips' latents."""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from vgjax.errors import UserError

RECORDS, INDEX = "texts.array_record", "texts.json"
# Of one text: tokens `m e`, which of them are real, a pooled vector `p` or None.
Text = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def pack(text: Text) -> bytes:
    """A text as bytes, without the zeros behind its last token."""
    c, mask, vec = text
    real = mask.size - int(np.argmax(mask[::-1])) if mask.any() else 0
    out = io.BytesIO()
    np.savez(out, c=c[:real], mask=mask, **({} if vec is None else {"vec": vec}))
    return out.getvalue()


def unpack(data: bytes) -> Text | None:
    """The text, or None where the bytes are no whole one."""
    try:
        with np.load(io.BytesIO(data)) as kept:
            c, mask = kept["c"], kept["mask"]
            return np.pad(c, ((0, mask.size - len(c)), (0, 0))), mask, kept["vec"] if "vec" in kept else None
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile):
        return None


class Embeddings:
    """A folder's encoded captions, in the place of a tokenizer: caption -> (`{"c", "vec"}`, mask)."""

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

    def __call__(self, caption: str) -> tuple[dict[str, np.ndarray], Bool[np.ndarray, " m"]]:
        """What the encoders made of a caption of the set, or of the empty one."""
        text = unpack(self.records[self.places[caption]]) if caption in self.places else None
        if text is None:
            raise UserError(f"{self.path}: the caption {caption[:80]!r} is not among the encoded ones; encode it again")
        c, mask, vec = text
        return {"c": c} if vec is None else {"c": c, "vec": vec}, mask


class EmbeddingWriter:
    """Writes encoded captions into `folder`: `add(caption, text)`, then `close`."""

    def __init__(self, folder: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self.folder, self.places = folder, {}
        self.writer: Any = ArrayRecordWriter(str(folder / RECORDS), "group_size:1,uncompressed")

    def add(self, caption: str, text: Text) -> None:
        """Appends one caption that is not there yet."""
        self.places[caption] = len(self.places)
        self.writer.write(pack(text))

    def close(self) -> None:
        """Ends the set."""
        self.writer.close()
        (self.folder / INDEX).write_text(json.dumps(self.places))
