"""Tokenizers without a vocabulary file: bytes (ByT5, Xue et al. 2021) and hashed words (Svenstrup et al. 2017).

A caption becomes `ids` int32 `m r` and `mask` bool `m`. Id 0 is padding; position 0 always holds the begin token, so an
empty or dropped caption still has one token to attend to.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Bool, Int32

from vgjax.errors import UserError
from vgjax.typing import Context, Tokens

STREAM = "text"  # where captions stand in a Context

PADDING, BEGIN, FIRST = 0, 1, 2

# Scripts written without spaces: each character is a word (Thai to Tibetan, Myanmar, Khmer, kana, Han).
SPACELESS = (
    *((0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x30FF), (0x31F0, 0x31FF)),
    *((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
)


@dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes: any language, no collisions, long sequences."""

    length: int
    hashes = 1
    vocab = FIRST + 256

    def __post_init__(self) -> None:
        _check_length(self.length)

    def count(self, caption: str) -> int:
        """Tokens of the whole caption, the begin token too."""
        return 1 + len(caption.encode("utf-8", "replace"))

    def __call__(self, caption: str) -> tuple[Int32[np.ndarray, "m r"], Bool[np.ndarray, " m"]]:
        """ids `length 1` and mask `length` of a caption, cut after `length - 1` bytes."""
        text = caption.encode("utf-8", "replace")[: self.length - 1]
        return _pad([(BEGIN,), *((FIRST + byte,) for byte in text)], self.length, 1)


@dataclass(frozen=True)
class Words:
    """Lower-cased words, each as two independent hashes: two words share both once in `buckets` squared."""

    length: int
    buckets: int = 2048
    hashes = 2

    def __post_init__(self) -> None:
        _check_length(self.length)
        if self.buckets <= FIRST:
            raise UserError(f"buckets must be more than {FIRST} (padding and begin), got {self.buckets}")

    @property
    def vocab(self) -> int:
        """Ids are in [0, vocab)."""
        return self.buckets

    def count(self, caption: str) -> int:
        """Tokens of the whole caption, the begin token too."""
        return 1 + len(split(caption))

    def __call__(self, caption: str) -> tuple[Int32[np.ndarray, "m r"], Bool[np.ndarray, " m"]]:
        """ids `length 2` and mask `length` of a caption, cut after `length - 1` words."""
        words = islice(split(caption), self.length - 1)
        return _pad([(BEGIN, BEGIN), *(self._ids(word) for word in words)], self.length, 2)

    def _ids(self, word: str) -> tuple[int, int]:
        digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=16).digest()
        halves = (int.from_bytes(half, "little") for half in (digest[:8], digest[8:]))
        first, second = (FIRST + half % (self.buckets - FIRST) for half in halves)
        return first, second


@dataclass(frozen=True)
class Learned:
    """Captions as ids of a tokenizer: the conditioner of a text encoder that is trained with the model."""

    tokenizer: Bytes | Words
    frozen: ClassVar[bool] = False

    def __call__(self, captions: Sequence[str]) -> Context:
        """Rows of ids."""
        read = functools.lru_cache(None)(self.tokenizer)
        ids, mask = zip(*map(read, captions), strict=True)
        return Context({STREAM: Tokens(np.stack(ids), np.stack(mask))})

    def abstract(self, count: int) -> Context:
        """The shapes of so many rows."""
        shape = count, self.tokenizer.length, self.tokenizer.hashes
        return Context({STREAM: Tokens(jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape[:2], bool))})

    def placed(self, where: Any) -> "Learned":
        """Itself: it computes on the host."""
        return self

    def cut(self, captions: Sequence[str]) -> list[str]:
        """What is to be said of captions that are longer than what is read of them."""
        return cut([*map(self.tokenizer.count, captions)], self.tokenizer.length)


def cut(counts: Sequence[int], length: int, by: str = "") -> list[str]:
    """A sentence on the texts of so many tokens that are longer than `length`; none where none is."""
    if not (over := [count for count in counts if count > length]):
        return []
    return [
        f"{len(over)} of {len(counts)} texts are longer than the {length} tokens that are read of them{by} (up to "
        f"{max(over)}): the rest of them is left out"
    ]


def split(text: str) -> list[str]:
    """Words of a text in any script: case, width and punctuation are ignored, marks stay with their letter."""
    words: list[str] = []
    touching = growing = False  # the character before belongs to the last word; that word may take another letter
    for char in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(char)[0]
        if kind == "M" and touching:
            words[-1] += char
            continue
        alone = any(low <= ord(char) <= high for low, high in SPACELESS)
        touching = kind in "LN"
        if touching and growing and not alone:
            words[-1] += char
        elif touching:
            words.append(char)
        growing = touching and not alone
    return words


def _check_length(length: int) -> None:
    if length < 1:
        raise UserError(f"the text length must be at least 1 (the begin token), got {length}")


def _pad(tokens: list[tuple[int, ...]], length: int, hashes: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((length, hashes), PADDING, np.int32)
    ids[: len(tokens)] = tokens
    return ids, np.arange(length) < len(tokens)
