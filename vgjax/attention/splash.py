"""Attention on TPU by splash, JAX's fused Pallas kernel: no scores in memory, forward or backward.

Its tiles are everything for its speed. They are chosen here from the local length, so that little is padded, and small
enough for the scoped vector memory of every TPU from v4 on, forward and backward.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from vgjax.attention.segments import Segments, everyone, pad
from vgjax.typing import Array, Float, PyTree

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
    n = q.shape[1]
    q, k, v = (rearrange(x, "b n h k -> b h n k") for x in (q, k, v))
    attend, parts, ids = _prepared(q, k, v, segments, interpret)
    o = rearrange(jax.vmap(attend)(*parts, ids), "b h n k -> b n h k")[:, :n]
    if segments is None:
        return o
    seen = segments.q != 0
    if not segments.same:  # the kernel gives a mean to a query without keys
        seen &= jax.vmap(lambda ids, keys: jnp.isin(ids, keys, method="sort"))(*segments)
    return jnp.where(seen[:, :, None, None], o, 0)


def with_lse(
    q: Float[Array, "b h n k"],
    k: Float[Array, "b h m k"],
    v: Float[Array, "b h m k"],
    segments: Segments | None,
    interpret: bool = False,
) -> tuple[Float[Array, "b h n k"], Float[Array, "b h n"]]:
    """As `full.with_lse`: the output in fp32 (rounded by the kernel to the type of q) and the log-sum-exp."""
    n = q.shape[2]
    attend, parts, ids = _prepared(q, k, v, segments, interpret, save_residuals=True)
    o, (lse,) = jax.vmap(attend)(*parts, ids)
    o, lse = o[:, :, :n].astype(jnp.float32), lse[:, :, :n]
    seen = lse > -1e19  # scores that may not be seen are lower by far
    return jnp.where(seen[..., None], o, 0), jnp.where(seen, lse, -1e20)


def gradients(
    q: Float[Array, "b h n k"],
    k: Float[Array, "b h m k"],
    v: Float[Array, "b h m k"],
    segments: Segments | None,
    o: Float[Array, "b h n k"],
    lse: Float[Array, "b h n"],
    do: Float[Array, "b h n k"],
    interpret: bool = False,
) -> tuple[Float[Array, "b h n k"], Float[Array, "b h m k"], Float[Array, "b h m k"]]:
    """As `full.gradients`: the kernel's backward pass, told the log-sum-exp over all keys instead of over these."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    n, m, scale = q.shape[2], k.shape[2], q.shape[-1] ** -0.5
    attend, parts, ids = _prepared(q, k, v, segments, interpret)
    o, lse, do = (pad(x, 2, parts[0].shape[2]) for x in (o, lse, do))

    def one(q: Array, k: Array, v: Array, ids: PyTree, o: Array, lse: Array, do: Array) -> tuple[Array, ...]:
        saved = (q, k, v, ids, None, o, lse, attend.dq_mask_info, attend.dkv_mask_info)
        return splash_attention_kernel._splash_attention_bwd(**attend.kwargs, res=saved, do=do)[3:6]

    dq, dk, dv = (x.astype(jnp.float32) for x in jax.vmap(one)(*parts, ids, o, lse, do.astype(q.dtype)))
    return dq[:, :, :n] * scale, dk[:, :, :m], dv[:, :, :m]


def tile(size: int, candidates: tuple[int, ...]) -> int:
    """The candidate that pads `size` least, the largest of those; a short sequence is one tile."""
    step = candidates[0] // 4
    if size <= candidates[0]:
        return -(-size // step) * step
    return min(candidates, key=lambda each: (-(-size // each) * each, -each))


def _prepared(
    q: Array, k: Array, v: Array, segments: Segments | None, interpret: bool, save_residuals: bool = False
) -> tuple[PyTree, tuple[Array, Array, Array], PyTree]:
    """(kernel for one sample, its scaled and padded arguments of the batch, the kernel's segment ids or None)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # half a second, for TPUs alone

    n, m = q.shape[2], k.shape[2]
    of_q, of_kv = tile(n, QUERIES), tile(m, KEYS)
    if segments is None and (n % of_q or m % of_kv):
        segments = everyone(len(q), n, m)
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q, k, v = (pad(x, 2, size) for x, size in ((q, of_q), (k, of_kv), (v, of_kv)))
    kernel = _kernel(q.shape[1], q.shape[2], k.shape[2], of_q, of_kv, interpret, save_residuals)
    if segments is None:
        return kernel, (q, k, v), None
    of_keys = pad(segments.kv, 1, of_kv)
    ids = kernels.SegmentIds(pad(segments.q, 1, of_q), jnp.where(of_keys == 0, -1, of_keys))  # 0 is nobody's
    return kernel, (q, k, v), ids


def _kernel(heads: int, n: int, m: int, of_q: int, of_kv: int, interpret: bool, save_residuals: bool) -> Any:
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
        save_residuals=save_residuals,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
