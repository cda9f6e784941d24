"""Attention whose tokens and heads are spread over devices: each device runs `local` on its own part.

The wrapper for every layout: it pads tokens and heads to what the devices divide (padding gets segment 0, which nobody
sees), and hands each device its part under the logical names of the house. In a joint video+text sequence the text is
part of the tokens, behind the video: a few hundred among many thousands, so they need no place of their own.
"""

from dataclasses import dataclass
from typing import Any

from vgjax import sharding
from vgjax.attention.full import Full
from vgjax.attention.segments import Segments, everyone, pad
from vgjax.typing import Array, Float

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
        q, k, v = (pad(pad(x, 1, tokens), 2, sharding.degree("heads")) for x in (q, k, v))
        ids = () if segments is None else tuple(pad(x, 1, tokens) for x in segments)
        names = (TOKENS,) * 3 + (TOKENS[:2],) * len(ids)

        def one(q: Array, k: Array, v: Array, *ids: Array) -> Array:
            return self.local(q, k, v, Segments(*ids) if ids else None)

        return sharding.local(one, names, q, k, v, *ids)[:, :n, :heads]
