"""Ulysses (Jacobs et al. 2023, arXiv:2309.14509): trade tokens for heads, attend to all tokens, and trade back."""

from dataclasses import dataclass

import jax

from vgjax.attention.segments import Segments, pad
from vgjax.typing import Array, Attention, Float


@dataclass(frozen=True)
class Ulysses:
    """On one device of `axis`, inside `Parallel`: its tokens of all heads become all tokens of its heads.

    Four all-to-alls a call, each of 1/devices of a tensor. Heads that the devices do not divide are padded with zeros,
    so 12 heads on 8 devices cost as much as 16.
    """

    inner: Attention
    axis: str

    def __call__(
        self,
        q: Float[Array, "b n h k"],
        k: Float[Array, "b m h k"],
        v: Float[Array, "b m h k"],
        segments: Segments | None = None,
    ) -> Float[Array, "b n h k"]:
        devices, heads = jax.lax.axis_size(self.axis), q.shape[2]

        def to_heads(x: Array) -> Array:
            return jax.lax.all_to_all(pad(x, 2, devices), self.axis, split_axis=2, concat_axis=1, tiled=True)

        if segments is not None:
            segments = segments.each(lambda ids: jax.lax.all_gather(ids, self.axis, axis=1, tiled=True))
        o = self.inner(*map(to_heads, (q, k, v)), segments)
        return jax.lax.all_to_all(o, self.axis, split_axis=1, concat_axis=2, tiled=True)[:, :, :heads]
