"""Attention whose tokens and heads are spread over devices: each device runs `local` on its own part.

The wrapper for every layout: it pads tokens and heads to what the devices divide (padding gets segment 0, which nobody
sees), and hands each device its part under the logical names of the house.

In a joint sequence every device holds its part of the video and, behind it, its part of the text (`join`): so streams
meet and part again without a token that changes its device, and the few text tokens are shared out like the others.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange

from vgjax.attention.full import Full
from vgjax.attention.segments import Segments, everyone, pad
from vgjax.parallel import sharding
from vgjax.typing import Array, Attention, Float, Shaped

TOKENS = ("batch", "tokens", "heads", None)
WHOLE = ("batch", None, "heads", None)


@dataclass(frozen=True)
class Parallel:
    """`local` meets the other devices' tokens by itself (`Ulysses`, `Ring`), or needs none.

    keys: False where the keys are few (a caption's) and whole on every device: then nothing is sent. With no layout
    active there are no other devices, and `alone` serves.
    """

    local: Attention
    alone: Attention = Full()
    keys: bool = True

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
        if segments is None and self.keys and (n % tokens or k.shape[1] % tokens):
            segments = everyone(len(q), n, k.shape[1])
        of_k, spread = (TOKENS, fill) if self.keys else (WHOLE, lambda x: x)
        q, k, v = (pad(x, 2, sharding.degree("heads")) for x in (fill(q), spread(k), spread(v)))
        ids = () if segments is None else (fill(segments.q), *(() if segments.same else (spread(segments.kv),)))
        names = (TOKENS, of_k, of_k, *(TOKENS[:2], of_k[:2])[: len(ids)])

        def one(q: Array, k: Array, v: Array, *ids: Array) -> Array:
            return self.local(q, k, v, Segments(ids[0], ids[-1]) if ids else None)

        return sharding.local(one, names, q, k, v, *ids)[:, :n, :heads]


CROSS = Parallel(Full(), keys=False)


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
