"""What the encoders of a converted folder make of texts: computed once, kept beside the models.

A set of texts is `(c, mask, vec)`: tokens `b m e`, which of them are real, and pooled vectors `b p` or None. Positions
behind a text are zeros.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vgjax.data.embeddings import Text, pack, unpack
from vgjax.data.storage import MANIFEST
from vgjax.open.store import Store
from vgjax.parallel.distributed import fetch
from vgjax.training.checkpoint import SUBDIR
from vgjax.typing import Bool, Float, PyTree

FOLDER = "embeddings"
ROWS = 8  # texts at a time, in one compiled size
Texts = tuple[Float[np.ndarray, "b m e"], Bool[np.ndarray, "b m"], Float[np.ndarray, "b p"] | None]


def embed(store: Store, family: Any, prompts: Sequence[str], keep: bool = True) -> Texts:
    """`(c, mask, vec)` of prompts. What is new among them is computed, and kept where the folder can be written."""
    wanted = [family.clean(prompt) for prompt in prompts]
    keep = keep and jax.process_count() == 1  # processes compute together, or not at all
    own = reading(store, family) if keep else ""
    found: dict[str, Text] = {}
    for text in dict.fromkeys(wanted):
        if keep and (kept := _read(_file(store, own, text))) is not None:
            found[text] = kept
    if new := [text for text in dict.fromkeys(wanted) if text not in found]:
        c, mask, vec = family.texts(store, new)
        c = np.where(mask[..., None], c, 0.0)
        for i, text in enumerate(new):
            found[text] = c[i], mask[i], None if vec is None else vec[i]
            if keep:
                _write(_file(store, own, text), found[text])
    return jax.tree.map(lambda *rows: np.stack(rows), *(found[text] for text in wanted))


def apply(module: Any, params: PyTree, *rows: np.ndarray) -> PyTree:
    """`module` on the rows, `ROWS` at a time: on the host, fp32."""
    count, size = len(rows[0]), min(ROWS, len(rows[0]))
    run, parts = jax.jit(module.apply), []
    for start in range(0, count, size):
        some = [part[start : start + size] for part in rows]
        parts.append(fetch(run({"params": params}, *(padded(part, size) for part in some))))
    return jax.tree.map(lambda *x: np.concatenate(x)[:count].astype(np.float32), *parts)


def padded(rows: np.ndarray, size: int) -> np.ndarray:
    """The rows, the last one repeated: for one compiled size."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])


def identity(store: Store, *names: str) -> str:
    """sha256 of what the numbers of some models depend on: their bytes, tokenizers, and the type they compute in.

    names: of their folders, as patterns.
    """
    total = hashlib.sha256(np.dtype(store.dtype).name.encode())
    for name in names:
        files = [*store.folder.glob(f"{name}/{SUBDIR}/*/{MANIFEST}"), *store.folder.glob(f"{name}/*.*")]
        for file in sorted(files):
            total.update(f"{file.relative_to(store.folder)} ".encode() + file.read_bytes())
    return total.hexdigest()


def reading(store: Store, family: Any) -> str:
    """sha256 of what embeddings depend on beside the text: the encoders and tokenizers, and how the family uses them.

    Of the family all its constants count (template, crop, lengths, skipped blocks), so that none can be left out.
    """
    constants = {name: value for name, value in vars(family).items() if name.isupper() and isinstance(value, str | int)}
    said = json.dumps([identity(store, "text_encoder*", "tokenizer*"), sorted(constants.items())])
    return hashlib.sha256(said.encode()).hexdigest()


def _file(store: Store, own: str, text: str) -> Path:
    return store.folder / FOLDER / f"{hashlib.sha256(f'{own} {text}'.encode()).hexdigest()}.npz"


def _write(file: Path, text: Text) -> None:
    """Kept by one rename; a folder that cannot be written keeps nothing."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as part:
            part.write(pack(text))
        os.replace(part.name, file)


def _read(file: Path) -> Text | None:
    """What was kept; None where it is not there, or was cut off."""
    try:
        return unpack(file.read_bytes())
    except OSError:
        return None
