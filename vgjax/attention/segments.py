"""Who may see whom: one integer a token. A query sees the keys that carry its own id; 0 is padding."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from vgjax.typing import Array, Bool, Int


class Segments(NamedTuple):
    """Segment ids of queries and keys. A query with id 0, or with no key of its id, gets an output of 0.

    Where queries and keys are the same tokens (`among`) the two are one array, and stay one through `each`: so a kernel
    knows that no query lacks a key.
    """

    q: Int[Array, "b n"]
    kv: Int[Array, "b m"]

    @property
    def same(self) -> bool:
        """Whether queries and keys are known to be the same tokens."""
        return self.q is self.kv

    def each(self, change: Callable[[Array], Array]) -> "Segments":
        """Both ids through `change`."""
        return among(change(self.q)) if self.same else Segments(change(self.q), change(self.kv))


def among(ids: Int[Array, "b n"]) -> Segments:
    """Self-attention of tokens that carry these ids."""
    return Segments(ids, ids)


def everyone(b: int, n: int, m: int) -> Segments:
    """All `n` queries of a sample see all its `m` keys: what padding, with its 0, is told from."""
    return Segments(jnp.ones((b, n), jnp.int32), jnp.ones((b, m), jnp.int32))


def allowed(segments: Segments) -> Bool[Array, "b n m"]:
    """The dense mask that the ids stand for."""
    return (segments.q[:, :, None] == segments.kv[:, None, :]) & (segments.kv[:, None, :] != 0)


def pad(x: Array, dim: int, multiple: int) -> Array:
    """Zeros at the end of `dim`, up to a length that `multiple` divides."""
    extra = -x.shape[dim] % multiple
    return jnp.pad(x, [(0, extra if i == dim else 0) for i in range(x.ndim)]) if extra else x
