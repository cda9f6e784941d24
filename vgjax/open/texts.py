"""What the text encoders of converted folders make of texts: computed once, kept beside the models."""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from ml_collections import ConfigDict

from vgjax.data.embeddings import pack, row_of, stacked, unpack
from vgjax.data.storage import MANIFEST
from vgjax.data.text import cut
from vgjax.errors import UserError
from vgjax.models.clip import CLIPText
from vgjax.models.llama import Llama
from vgjax.models.t5 import T5Encoder
from vgjax.open.store import INDEX, Store, counted
from vgjax.parallel import sharding
from vgjax.parallel.distributed import fetch
from vgjax.parallel.layouts import Placement
from vgjax.training.checkpoint import SUBDIR
from vgjax.typing import Conditioner, Config, Context, Dtype, Json, Module, Params, PyTree, Tokens

FOLDER = "embeddings"
ROWS = 8  # texts at a time, in one compiled size
GIVES = ("tokens", "pooled", "both")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A text encoder of a folder, and how it is asked.

    component: its folder; that of its tokenizer is named alike. length: tokens that are kept of a text. gives:
    `tokens`, a `pooled` vector, or `both`. template: the words around a text; the first `crop` tokens, those before it,
    are left out of the result. skipped: last blocks that are left out, and the final norm with them. padded: it attends
    to padding too.
    """

    component: str
    length: int
    gives: str = "tokens"
    template: str = "{}"
    crop: int = 0
    skipped: int = 0
    padded: bool = False

    def __post_init__(self) -> None:
        if self.gives not in GIVES or self.length < 1 or self.crop < 0 or self.skipped < 0 or "{}" not in self.template:
            raise UserError(
                f"the text encoder {self.component}: gives={self.gives!r} must be one of {', '.join(GIVES)}, "
                f"length={self.length} at least 1, crop={self.crop} and skipped={self.skipped} at least 0, and "
                f"template={self.template!r} must hold {{}}, the place of the text"
            )

    @property
    def tokenizer(self) -> str:
        """The folder of its tokenizer."""
        return self.component.replace("text_encoder", "tokenizer")

    def asked(self, texts: Sequence[str]) -> list[str]:
        """The texts in the template."""
        return [self.template.format(text) for text in texts]

    def widths(self, store: Store) -> tuple[int, int]:
        """Widths of its tokens and of its pooled vector, if it has one."""
        own = store.module(store.published(self.component), self.component)
        return own.dim, getattr(own, "projection", None) or own.dim

    def encoded(self, store: Store, texts: Sequence[str]) -> tuple[Tokens | None, np.ndarray | None]:
        """(tokens `b m e`, zeros behind a text, and which are real; pooled vectors `b p`), None for what is not
        given."""
        ids, mask = store.tokens(self.tokenizer, self.asked(texts), self.crop + self.length)
        with sharding.within(store.where), store.model(self.component, **self._changed(store)) as (model, params, _):
            out = apply(model, params, ids, np.ones_like(mask) if self.padded else mask)
        c, vec = out if isinstance(out, tuple) else (out, None)
        if vec is None and self.gives != "tokens":
            raise UserError(f"{store.folder / self.component} gives no pooled vector: gives must be 'tokens'")
        c, mask = c[:, self.crop :], mask[:, self.crop :]
        tokens = Tokens(np.where(mask[..., None], c, 0.0), mask)
        return tokens if self.gives != "pooled" else None, vec if self.gives != "tokens" else None

    def _changed(self, store: Store) -> Json:
        if not self.skipped:
            return {}
        own = store.module(store.published(self.component), self.component)
        if not hasattr(own, "norm") or self.skipped >= own.blocks:
            raise UserError(
                f"skipped={self.skipped}: of {store.folder / self.component} blocks cannot be left out, or not so many"
            )
        return {"blocks": own.blocks - self.skipped, "norm": False}


@dataclasses.dataclass(frozen=True, eq=False)
class Frozen:
    """The conditioner of published encoders: streams of tokens by name, pooled vectors side by side.

    parts: by stream the folder and its encoder. clean: of a text, what they are shown. widths: of tokens and pooled
    vectors, where the folder need not be asked.
    """

    parts: Mapping[str, tuple[Store, Encoder]]
    clean: Callable[[str], str] = str
    widths: tuple[int, int] | None = None
    frozen: ClassVar[bool] = True

    def __call__(self, captions: Sequence[str], keep: bool = True) -> Context:
        """Rows of the captions. What is new among them is computed, and kept where the folder can be written."""
        wanted = [self.clean(caption) for caption in captions]
        streams, vectors = {}, []
        for name, (store, encoder) in self.parts.items():
            rows = embed(store, encoder, wanted, keep)
            if rows.text:
                (streams[name],) = rows.text.values()
            vectors += [] if rows.vec is None else [rows.vec]
        return Context(streams, np.concatenate(vectors, axis=-1) if vectors else None)

    def abstract(self, count: int) -> Context:
        """The shapes of so many rows."""
        streams, pooled = {}, 0
        for name, (store, encoder) in self.parts.items():
            width, of_vector = self.widths or encoder.widths(store)
            pooled += of_vector if encoder.gives != "tokens" else 0
            if encoder.gives != "pooled":
                shape = count, encoder.length
                c = jax.ShapeDtypeStruct((*shape, width), np.float32)
                streams[name] = Tokens(c, jax.ShapeDtypeStruct(shape, bool))
        return Context(streams, jax.ShapeDtypeStruct((count, pooled), np.float32) if pooled else None)

    def cut(self, captions: Sequence[str]) -> list[str]:
        """What is to be said of captions that are longer than what is read of them."""
        wanted, said = [self.clean(caption) for caption in captions], []
        for store, encoder in self.parts.values():
            counts = counted(store.folder / encoder.tokenizer, encoder.asked(wanted))
            said += cut([count - encoder.crop for count in counts], encoder.length, f" by {encoder.component}")
        return said

    def placed(self, where: Placement | None) -> "Frozen":
        """The same on a placement."""
        parts = {name: (dataclasses.replace(store, where=where), one) for name, (store, one) in self.parts.items()}
        return dataclasses.replace(self, parts=parts)

    def identity(self) -> str:
        """sha256 of all that its rows depend on beside the captions, but the type that it computes in."""
        wide = {name: (dataclasses.replace(store, dtype=np.float32), one) for name, (store, one) in self.parts.items()}
        each = {name: reading(store, encoder) for name, (store, encoder) in wide.items()}
        said = json.dumps([each, f"{self.clean.__module__}.{self.clean.__qualname__}"])
        return hashlib.sha256(said.encode()).hexdigest()


class Remembered:
    """A frozen conditioner that keeps in memory what it has read: its encoders need the devices only once."""

    frozen = True

    def __init__(self, conditioner: Conditioner):
        self.conditioner, self.rows = conditioner, {}

    def __call__(self, captions: Sequence[str]) -> Context:
        """Rows of the captions."""
        if new := [caption for caption in dict.fromkeys(captions) if caption not in self.rows]:
            rows = self.conditioner(new)
            self.rows |= {caption: row_of(rows, i) for i, caption in enumerate(new)}
        return stacked([self.rows[caption] for caption in captions])

    def abstract(self, count: int) -> Context:
        """The shapes of so many rows."""
        return self.conditioner.abstract(count)

    def placed(self, where: Placement | None) -> "Remembered":
        """The same on a placement, which has read nothing yet."""
        return Remembered(self.conditioner.placed(where))

    def cut(self, captions: Sequence[str]) -> list[str]:
        """What is to be said of captions that are longer than what is read of them."""
        return self.conditioner.cut(captions)


# How the encoders of each kind are asked unless a config says otherwise: Llama as HunyuanVideo asks it.
ASKED: dict[type, Json] = {
    T5Encoder: dict(length=256),
    CLIPText: dict(length=77, gives="pooled", padded=True),
    Llama: dict(length=256, skipped=2),
}


def frozen(path: str, encoders: Config | ConfigDict | Sequence[str], dtype: Dtype, call: Callable[..., Any]) -> Frozen:
    """The published encoders that a config names: by their folders in the converted folder `path`, or by stream what
    they are asked (`component`, another `path`, the fields of Encoder).

    call: checks a section against what it builds.
    """
    named = dict(encoders) if isinstance(encoders, Mapping | ConfigDict) else {name: {} for name in encoders}
    if not named:
        raise UserError("config.text.encoders names none: give models of a converted folder, as ('text_encoder',)")
    parts = {}
    for name, section in named.items():
        where, options = f"config.text.encoders.{name}", dict(section)
        component, folder = options.pop("component", name), Path(options.pop("path", path)).absolute()
        store = Store(folder, dtype)
        if not (folder / INDEX).is_file() or not store.has(component):
            raise UserError(f"{where}: {folder} is no converted folder that holds {component!r}: give its path")
        asked = ASKED.get(type(store.module(store.published(component), component)))
        if asked is None:
            raise UserError(f"{where}: {folder / component} reads no text: name a text encoder")
        parts[name] = store, call(where, Encoder, {**asked, **options}, component=component)
    return Frozen(parts)


def embed(store: Store, encoder: Encoder, texts: Sequence[str], keep: bool = True) -> Context:
    """What one encoder makes of texts: its tokens as the only stream, and its pooled vectors."""
    keep = keep and jax.process_count() == 1  # processes compute together, or not at all
    own = reading(store, encoder) if keep else ""
    found: dict[str, Context] = {}
    for text in dict.fromkeys(texts):
        if keep and (kept := _read(_file(store, own, text))) is not None:
            found[text] = kept
    if new := [text for text in dict.fromkeys(texts) if text not in found]:
        tokens, vec = encoder.encoded(store, new)
        rows = Context({} if tokens is None else {encoder.component: tokens}, vec)
        for i, text in enumerate(new):
            found[text] = row_of(rows, i)
            if keep:
                _write(_file(store, own, text), found[text])
    return stacked([found[text] for text in texts])


def apply(module: Module, params: Params, *rows: np.ndarray) -> PyTree:
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


def reading(store: Store, encoder: Encoder) -> str:
    """sha256 of what embeddings depend on beside the text: the encoder, its tokenizer, and how it is asked."""
    said = json.dumps([identity(store, encoder.component, encoder.tokenizer), dataclasses.asdict(encoder)])
    return hashlib.sha256(said.encode()).hexdigest()


def _file(store: Store, own: str, text: str) -> Path:
    return store.folder / FOLDER / f"{hashlib.sha256(f'{own} {text}'.encode()).hexdigest()}.npz"


def _write(file: Path, row: Context) -> None:
    """Kept by one rename; a folder that cannot be written keeps nothing."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as part:
            part.write(pack(row))
        os.replace(part.name, file)


def _read(file: Path) -> Context | None:
    """What was kept; None where it is not there, or was cut off."""
    try:
        return unpack(file.read_bytes())
    except OSError:
        return None
