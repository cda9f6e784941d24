"""Attention on TPU by splash, JAX's fused Pallas kernel: no scores in memory, forward or backward.

Its tiles are everything for its speed. They are chosen here from the local length, so that little is padded, and small
enough for the scoped vector memory of every TPU from v4 on, forward and backward.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from vgjax.attention.segments import Segments, allowed, everyone, pad
from vgjax.typing import Array, Float

# Candidates for a tile, multiples of a TPU's 128 lanes; half a tile of keys is one too.
QUERIES = (512, 640, 768, 896, 1024)
KEYS = (1024, 1280, 1536, 2048)


def splash(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h k"],
    segments: Segments | None,
    interpret: bool = False,
) -> Float[Array, "b n h k"]:
    """Full attention; its output and log-sum-exp carry the name "attention" for remat. interpret: without a TPU."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # half a second, for TPUs alone

    n, m, heads = q.shape[1], k.shape[1], q.shape[2]
    of_q, of_kv = tile(n, QUERIES), tile(m, KEYS)
    if segments is None and (n % of_q or m % of_kv):
        segments = everyone(q, k)
    q, k, v = (rearrange(x, "b n h k -> b h n k") for x in (q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k, v))
    q, k, v = (pad(x, 2, size) for x, size in ((q, of_q), (k, of_kv), (v, of_kv)))
    attend = jax.vmap(_kernel(heads, q.shape[2], k.shape[2], of_q, of_kv, interpret))
    if segments is None:
        return rearrange(attend(q, k, v), "b h n k -> b n h k")
    ids = Segments(pad(segments.q, 1, of_q), pad(segments.kv, 1, of_kv))
    o = rearrange(attend(q, k, v, kernels.SegmentIds(*ids)), "b h n k -> b n h k")[:, :n]
    # The kernel knows no id of its own for padding, and gives a mean to a query without keys.
    seen = jnp.any(allowed(segments), axis=-1)  # fused: no mask in memory
    return jnp.where(seen[:, :, None, None], o, 0)


def tile(size: int, candidates: tuple[int, ...]) -> int:
    """The candidate that pads `size` least, the largest of those; a short sequence is one tile."""
    step = candidates[0] // 4
    if size <= candidates[0]:
        return -(-size // step) * step
    return min(candidates, key=lambda each: (-(-size // each) * each, -each))


def _kernel(heads: int, n: int, m: int, of_q: int, of_kv: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    mask = kernels.MultiHeadMask([kernels.FullMask((n, m))] * heads)
    sizes = kernels.BlockSizes(
        block_q=of_q,
        block_kv=of_kv,
        block_kv_compute=of_kv // 2,
        block_q_dkv=of_q,
        block_kv_dkv=of_kv,
        block_kv_dkv_compute=math.gcd(of_kv, 512),
        block_q_dq=of_q,
        block_kv_dq=of_kv // 2,
    )
    return kernels.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
