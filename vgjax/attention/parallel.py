"""Attention whose tokens and heads are spread over devices: each device runs `local` on its own part.

The wrapper for every layout: it pads tokens and heads to what the devices divide (padding gets segment 0, which nobody
sees), and hands each device its part under the logical names of the house.

In a joint sequence every device holds its part of the video and, behind it, its part of the text (`join`): so streams
meet and part again without a token that changes its device, and the few text tokens are shared out like the others.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from einops import rearrange

from vgjax import sharding
from vgjax.attention.full import Full
from vgjax.attention.segments import Segments, everyone, pad
from vgjax.typing import Array, Float, Shaped

TOKENS = ("batch", "tokens", "heads", None)


@dataclass(frozen=True)
class Parallel:
    """`local` meets the other devices' tokens by itself (`Ulysses`, `Ring`), or needs none.

    With no layout active there are no other devices, and `alone` serves.
    """

    local: Any
    alone: Any = Full()

    def __call__(
        self,
        q: Float[Array, "b n h k"],
        k: Float[Array, "b m h k"],
        v: Float[Array, "b m h k"],
        segments: Segments | None = None,
    ) -> Float[Array, "b n h k"]:
        if not sharding.active():
            return self.alone(q, k, v, segments)
        n, heads = q.shape[1:3]
        tokens = sharding.degree("tokens")
        if segments is None and (n % tokens or k.shape[1] % tokens):
            segments = everyone(len(q), n, k.shape[1])
        q, k, v = (pad(fill(x), 2, sharding.degree("heads")) for x in (q, k, v))
        ids = () if segments is None else segments.each(fill)[: 1 if segments.same else 2]
        names = (TOKENS,) * 3 + (TOKENS[:2],) * len(ids)

        def one(q: Array, k: Array, v: Array, *ids: Array) -> Array:
            return self.local(q, k, v, Segments(ids[0], ids[-1]) if ids else None)

        return sharding.local(one, names, q, k, v, *ids)[:, :n, :heads]


@dataclass(frozen=True)
class Cross:
    """Spread tokens attend to few keys (a caption's), which every device holds whole: nothing is sent."""

    local: Any = Full()

    def __call__(
        self,
        q: Float[Array, "b n h k"],
        k: Float[Array, "b m h k"],
        v: Float[Array, "b m h k"],
        segments: Segments | None = None,
    ) -> Float[Array, "b n h k"]:
        if not sharding.active():
            return self.local(q, k, v, segments)
        n, heads = q.shape[1:3]
        q, k, v = (pad(x, 2, sharding.degree("heads")) for x in (fill(q), k, v))
        ids = () if segments is None else (fill(segments.q), segments.kv)
        whole = ("batch", None, "heads", None)
        names = (TOKENS, whole, whole, *(TOKENS[:2], whole[:2])[: len(ids)])

        def one(q: Array, k: Array, v: Array, *ids: Array) -> Array:
            return self.local(q, k, v, Segments(*ids) if ids else None)

        return sharding.local(one, names, q, k, v, *ids)[:, :n, :heads]


def fill(x: Shaped[Array, "b n *d"]) -> Shaped[Array, "b _ *d"]:
    """Zeros behind the tokens (dim 1), up to a length that the devices which share them divide."""
    return pad(x, 1, sharding.degree("tokens"))


def join(x: Shaped[Array, "b n *d"], c: Shaped[Array, "b m *d"]) -> Shaped[Array, "b n+m *d"]:
    """Two streams, `fill`ed, as one sequence: on each device first its part of `x`, then its part of `c`."""
    p = sharding.degree("tokens")
    each = [rearrange(stream, "b (p n) ... -> b p n ...", p=p) for stream in (x, c)]
    return rearrange(jnp.concatenate(each, axis=2), "b p n ... -> b (p n) ...")


def part(
    joined: Shaped[Array, "b j *d"], count: int
) -> tuple[Shaped[Array, "b j-{count} *d"], Shaped[Array, "b {count} *d"]]:
    """The two streams of `join`, the second of `count` tokens."""
    p = sharding.degree("tokens")
    each = rearrange(joined, "b (p n) ... -> b p n ...", p=p)
    n = each.shape[2] - count // p
    return tuple(rearrange(stream, "b p n ... -> b (p n) ...") for stream in (each[:, :, :n], each[:, :, n:]))
