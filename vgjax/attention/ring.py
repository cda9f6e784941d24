"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values travel round the devices, queries stay.

Each device attends to one block of keys after the other and merges what it finds by log-sum-exp, in fp32. The next
block is sent before the present one is used, and the last is not sent on. Segment ids travel with their keys. The
backward pass keeps the output and its log-sum-exp, and goes round once more: gradients travel with their keys, in fp32.
So memory does not grow with the number of devices.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from vgjax.attention import full, splash
from vgjax.attention.segments import Segments
from vgjax.parallel.sharding import platform
from vgjax.typing import Array, Float, PyTree


@dataclass(frozen=True)
class Ring:
    """On one device of `axis`, inside `Parallel`: attention of its queries to the tokens of all devices.

    Works for any number of heads. A block is attended to by the fused kernel on TPU, elsewhere `chunk` queries at a
    time. What remat may keep, output and log-sum-exp, is named "attention".
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
        q, k, v = (rearrange(x, "b n h k -> b h n k") for x in (q, k, v))
        return rearrange(_attend(self, q, k, v, segments), "b h n k -> b n h k")

    @property
    def devices(self) -> int:
        """How many there are on the ring."""
        return jax.lax.axis_size(self.axis)

    def send(self, block: PyTree) -> PyTree:
        """To the next device."""
        onward = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.lax.ppermute(block, self.axis, onward)

    def forms(self, q: Array, k: Array) -> tuple[Callable[..., PyTree], Callable[..., PyTree]]:
        """(attention with its log-sum-exp, its gradients) for one block of keys."""
        if platform() == "tpu" and q.shape[2] * k.shape[2] > full.SHORT:
            return splash.with_lse, splash.gradients
        return partial(full.with_lse, chunk=self.chunk), partial(full.gradients, chunk=self.chunk)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, q: Array, k: Array, v: Array, segments: Segments | None) -> Array:
    return _forward(ring, q, k, v, segments)[0]


def _forward(ring: Ring, q: Array, k: Array, v: Array, segments: Segments | None) -> tuple[Array, tuple]:
    with_lse, _ = ring.forms(q, k)

    def attend(block: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
        k, v, ids = block
        return with_lse(q, k, v, _segments(segments, ids))

    def turn(carry: tuple, _: None) -> tuple[tuple, None]:
        block, seen = carry
        following = ring.send(block)
        return (following, merge(seen, attend(block))), None

    nothing = (jnp.zeros(q.shape[:3] + v.shape[-1:], jnp.float32), jnp.full(q.shape[:3], -1e30, jnp.float32))
    block = (k, v, None if segments is None else segments.kv)
    (block, seen), _ = jax.lax.scan(turn, (block, nothing), length=ring.devices - 1)
    o, lse = merge(seen, attend(block))
    o, lse = checkpoint_name((o.astype(q.dtype), lse), "attention")
    return o, (q, k, v, segments, o, lse)


def _backward(ring: Ring, saved: tuple, do: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, o, lse = saved
    _, gradients = ring.forms(q, k)

    def add(block: tuple[Array, Array, Array | None], dq: Array, of_block: PyTree) -> tuple[Array, PyTree]:
        k, v, ids = block
        more, *rest = gradients(q, k, v, _segments(segments, ids), o, lse, do)
        return dq + more, jax.tree.map(jnp.add, of_block, tuple(rest))

    def turn(carry: tuple, _: None) -> tuple[tuple, None]:
        # Both are on their way while this block is worked on: the next one, and what was found for this one elsewhere.
        block, dq, of_last = carry
        following, of_block = ring.send((block, of_last))
        return (following, *add(block, dq, of_block)), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    block = (k, v, None if segments is None else segments.kv)
    carry = (block, zeros[0], tuple(zeros[1:]))
    (block, dq, of_last), _ = jax.lax.scan(turn, carry, length=ring.devices - 1)
    dq, of_block = add(block, dq, ring.send(of_last))
    dk, dv = ring.send(of_block)  # home
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _segments(segments: Segments | None, ids: Array | None) -> Segments | None:
    return None if segments is None else Segments(segments.q, ids)


def merge(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two attentions over disjoint keys as one: outputs weighted by the share of their log-sum-exp."""
    lse = jnp.logaddexp(left[1], right[1])
    return sum(o * jnp.exp(part - lse)[..., None] for o, part in (left, right)), lse
