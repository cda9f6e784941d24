"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel round the devices, queries stay.

Each device attends to one block of keys after the other and merges what it finds by log-sum-exp, in fp32. The next
block is sent before the present one is used, and the last is not sent on. Segment ids travel with their keys.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from vgjax.attention.full import with_lse
from vgjax.attention.segments import Segments
from vgjax.typing import Array, Float


@dataclass(frozen=True)
class Ring:
    """On one device of `axis`, inside `Parallel`: attention of its queries to the tokens of all devices.

    Works for any number of heads. The backward pass recomputes the scores block by block; chunk: queries at a time.
    """

    axis: str
    chunk: int = 512

    def __call__(
        self,
        q: Float[Array, "b n h k"],
        k: Float[Array, "b m h k"],
        v: Float[Array, "b m h k"],
        segments: Segments | None = None,
    ) -> Float[Array, "b n h k"]:
        devices = jax.lax.axis_size(self.axis)
        onward = [(i, (i + 1) % devices) for i in range(devices)]
        q, k, v = (rearrange(x, "b n h k -> b h n k") for x in (q, k, v))

        def attend(block: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
            k, v, ids = block
            o, lse = with_lse(q, k, v, None if ids is None else Segments(segments.q, ids), self.chunk)
            return o.astype(jnp.float32), lse

        def turn(carry: tuple, _: None) -> tuple[tuple, None]:
            block, seen = carry
            following = jax.lax.ppermute(block, self.axis, onward)
            return (following, _merge(seen, attend(block))), None

        nothing = (jnp.zeros(q.shape[:3] + v.shape[-1:], jnp.float32), jnp.full(q.shape[:3], -1e30, jnp.float32))
        block = (k, v, None if segments is None else segments.kv)
        (block, seen), _ = jax.lax.scan(turn, (block, nothing), length=devices - 1)
        o, _ = _merge(seen, attend(block))
        return checkpoint_name(rearrange(o, "b h n k -> b n h k").astype(q.dtype), "attention")


def _merge(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two attentions over disjoint keys as one: outputs weighted by the share of their log-sum-exp."""
    lse = jnp.logaddexp(left[1], right[1])
    return sum(o * jnp.exp(part - lse)[..., None] for o, part in (left, right)), lse
