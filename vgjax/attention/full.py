"""Full softmax attention (Vaswani et al. 2017), in the form that is fastest on the platform at hand.

The forms give the same numbers; `Full.__call__` is the one place that chooses. Softmax is computed in fp32. What remat
may keep for the backward pass (`nn.stack.REMAT`) is named "attention": the output, on TPU its log-sum-exp too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jax.ad_checkpoint import checkpoint_name

from vgjax.attention.segments import Segments, allowed, pad
from vgjax.attention.splash import splash
from vgjax.parallel.sharding import is_local, platform
from vgjax.typing import Array, Bool, Float, PyTree

# CPU, measured by benchmarks/attention.py: below this many scores a head the batched form is as fast, above it
# the batched matmuls of XLA fall out of cache and one head at a time wins (2-4x at 2048 tokens).
SMALL = 160 * 160
# TPU: up to this many scores a head (a caption's tokens) XLA's own fusions do, and pad nothing to tiles.
SHORT = 512 * 512
# The widest head of the kernels: cuDNN takes no wider one, and splash's tiles would not fit a TPU's vector memory with
# the one head of a VAE's whole width.
WIDEST = 128
# cuDNN takes segments as a dense bias. Past this many bytes reading it costs more than to ask, as the program runs,
# whether a sample is one segment and padding, which needs none;
SMALL_BIAS = 2**26
# and past this many the chunked form needs less memory than the bias and its gradient, which cuDNN gives too.
LARGE_BIAS = 2**30
# Scores of all heads that the chunked form may hold there at a time: it is allocated also where it does not run.
HELD = 2**28


@dataclass(frozen=True)
class Full:
    """Every query sees every key of its segment.

    chunk: queries handled at a time where no fused kernel serves; memory grows with chunk x keys, not queries x keys.
    """

    chunk: int = 512

    def __call__(
        self,
        q: Float[Array, "b n h k"],
        k: Float[Array, "b m h k"],
        v: Float[Array, "b m h k"],
        segments: Segments | None = None,
    ) -> Float[Array, "b n h k"]:
        where = platform()
        if is_local() and q.shape[-1] <= WIDEST:  # XLA cannot split a kernel over devices
            if where == "tpu" and q.shape[1] * k.shape[1] > SHORT:
                return splash(q, k, v, segments)
            half = q.dtype in (jnp.bfloat16, jnp.float16)
            if where == "gpu" and half and q.shape[-1] % 8 == 0:
                return checkpoint_name(_cudnn(q, k, v, segments, self.chunk), "attention")
        form = partial(_by_chunks, chunk=self.chunk)
        if where == "cpu":
            form = _batched if q.shape[1] * k.shape[1] <= SMALL else partial(_by_heads, chunk=self.chunk)
        return checkpoint_name(_heads_first(form, q, k, v, segments), "attention")


def _heads_first(form: Callable[..., Array], q: Array, k: Array, v: Array, segments: Segments | None) -> Array:
    q, k, v = (rearrange(a, "b n h k -> b h n k") for a in (q, k, v))
    return rearrange(form(q, k, v, segments), "b h n k -> b n h k")


def _batched(q: Array, k: Array, v: Array, segments: Segments | None) -> Array:
    """All heads (`b h n k`) in two batched matmuls."""
    return _attend(q, k, v, None if segments is None else allowed(segments)[:, None])


def _by_chunks(q: Array, k: Array, v: Array, segments: Segments | None, chunk: int) -> Array:
    """`chunk` queries of all heads at a time; the backward pass recomputes their scores."""
    return _chunked(_batched, q, k, v, segments, chunk)


def _chunked(
    function: Callable[..., PyTree], q: Array, k: Array, v: Array, segments: Segments | None, chunk: int
) -> PyTree:
    """`function(q, k, v, segments)` of `chunk` queries at a time; its results begin with `b h n`."""
    n = q.shape[2]
    count = -(-n // chunk)
    q, ids = _cut(q, count), _cut_ids(segments, count)

    @jax.checkpoint
    def one(part: tuple[Array, Array | None]) -> PyTree:
        return function(part[0], k, v, None if segments is None else Segments(part[1], segments.kv))

    if count > 1:
        o = jax.lax.map(one, (q, ids))
    else:
        o = jax.tree.map(lambda x: x[None], one((q[0], None if ids is None else ids[0])))
    return jax.tree.map(lambda x: rearrange(x, "c b h n ... -> b h (c n) ...")[:, :, :n], o)


def _cut(x: Array, count: int) -> Array:
    """`count` chunks of the queries in front."""
    return rearrange(pad(x, 2, count), "b h (c n) ... -> c b h n ...", c=count)


def _cut_ids(segments: Segments | None, count: int) -> Array | None:
    return None if segments is None else rearrange(pad(segments.q, 1, count), "b (c n) -> c b n", c=count)


def _by_heads(q: Array, k: Array, v: Array, segments: Segments | None, chunk: int) -> Array:
    """One head of one sample at a time, its queries in chunks: plain 2-D matmuls, which XLA's CPU backend does best."""
    heads = q.shape[1]

    def one(head: tuple[Array, Array, Array, Segments | None]) -> Array:
        q, k, v = (a[None, None] for a in head[:3])
        ids = None if segments is None else jax.tree.map(lambda a: a[None], head[3])
        return _by_chunks(q, k, v, ids, chunk)[0, 0]

    ids = None if segments is None else segments.each(lambda a: repeat(a, "b n -> (b h) n", h=heads))
    qkv = (rearrange(a, "b h n k -> (b h) n k") for a in (q, k, v))
    return rearrange(jax.lax.map(one, (*qkv, ids)), "(b h) n k -> b h n k", h=heads)


def with_lse(
    q: Float[Array, "b h n k"],
    k: Float[Array, "b h m k"],
    v: Float[Array, "b h m k"],
    segments: Segments | None,
    chunk: int = 512,
) -> tuple[Float[Array, "b h n k"], Float[Array, "b h n"]]:
    """Attention and the log of its sum of exponentials, both fp32, so that more keys can be merged in.

    A query without keys has an output of 0 and a log-sum-exp of -1e20. `chunk` queries at a time.
    """

    def one(q: Array, k: Array, v: Array, segments: Segments | None) -> tuple[Array, Array]:
        weights, total, top = _weigh(q, k, None if segments is None else allowed(segments)[:, None])
        o = jnp.einsum("...nm,...mk->...nk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return o / total, (top + jnp.log(total))[..., 0]

    return _chunked(one, q, k, v, segments, chunk)


def gradients(
    q: Float[Array, "b h n k"],
    k: Float[Array, "b h m k"],
    v: Float[Array, "b h m k"],
    segments: Segments | None,
    o: Float[Array, "b h n k"],
    lse: Float[Array, "b h n"],
    do: Float[Array, "b h n k"],
    chunk: int = 512,
) -> tuple[Float[Array, "b h n k"], Float[Array, "b h m k"], Float[Array, "b h m k"]]:
    """What these keys and values add to the gradients of q, and their own; fp32.

    `o` and `lse` are of all the keys that the queries saw, `do` is the gradient of `o`: the softmax's weights follow
    from `lse`, so each block of keys does its part alone (Dao 2023, arXiv:2307.08691, algorithm 2).
    """
    n, scale = q.shape[2], q.shape[-1] ** -0.5
    count = -(-n // chunk)
    inner = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), axis=-1)
    rows = tuple(_cut(x, count) for x in (q, do, lse, inner))
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def one(sums: tuple[Array, Array], part: tuple) -> tuple[tuple[Array, Array], Array]:
        (q, do, lse, inner), ids = part
        mask = None if ids is None else allowed(Segments(ids, segments.kv))[:, None]
        weights = jnp.exp(_scores(q, k, mask) - lse[..., None])
        slope = weights * (einsum("bhnk,bhmk->bhnm", do, v) - inner[..., None]) * scale
        weights, slope = weights.astype(v.dtype), slope.astype(v.dtype)
        dk, dv = sums[0] + einsum("bhnm,bhnk->bhmk", slope, q), sums[1] + einsum("bhnm,bhnk->bhmk", weights, do)
        return (dk, dv), einsum("bhnm,bhmk->bhnk", slope, k)

    nothing = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    (dk, dv), dq = jax.lax.scan(one, nothing, (rows, _cut_ids(segments, count)))
    return rearrange(dq, "c b h n k -> b h (c n) k")[:, :, :n], dk, dv


def _attend(q: Array, k: Array, v: Array, mask: Bool[Array, "..."] | None) -> Array:
    """Softmax attention over the last two dims of `... n k`; `mask` broadcasts to `... n m`."""
    weights, total, _ = _weigh(q, k, mask)
    return jnp.einsum("...nm,...mk->...nk", (weights / total).astype(v.dtype), v)


def _weigh(q: Array, k: Array, mask: Bool[Array, "..."] | None) -> tuple[Array, Array, Array]:
    """(weights, their sum, the score that weighs 1) of each query, fp32."""
    scores = _scores(q, k, mask)
    # The floor makes a row without keys underflow to exact zeros, and its sum is then held away from 0: no NaN, and
    # no gradient. A row with keys has a sum of at least 1.
    top = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), -1e20))
    weights = jnp.exp(scores - top)
    return weights, jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 0.5), top


def _scores(q: Array, k: Array, mask: Bool[Array, "..."] | None) -> Array:
    scores = jnp.einsum("...nk,...mk->...nm", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    return scores if mask is None else jnp.where(mask, scores, -1e30)


def _cudnn(q: Array, k: Array, v: Array, segments: Segments | None, chunk: int) -> Array:
    """cuDNN's fused kernel, where it needs no large bias to say who may see whom."""
    if segments is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    bias = 2 * q.shape[0] * q.shape[1] * k.shape[1]
    chunk = min(chunk, max(64, HELD // (q.shape[0] * q.shape[2] * k.shape[1])))
    otherwise = _masked if bias <= LARGE_BIAS else partial(_heads_first, partial(_by_chunks, chunk=chunk))
    if bias <= SMALL_BIAS:
        return otherwise(q, k, v, segments)
    return jax.lax.cond(_is_single(segments), _counted, otherwise, q, k, v, segments)


def _is_single(segments: Segments) -> Bool[Array, ""]:
    """Whether each sample is one segment, with padding anywhere among its queries and keys."""
    one = jnp.max(segments.kv, axis=1, keepdims=True)
    return jnp.all(jnp.array([jnp.all((ids == one) | (ids == 0)) for ids in segments]))


def _counted(q: Array, k: Array, v: Array, segments: Segments) -> Array:
    """cuDNN told how many keys there are. What it leaves in padded places, gradients too, is replaced by zeros."""
    lengths = jnp.sum(segments.kv != 0, axis=1, dtype=jnp.int32)
    # The kernel wants all padding behind the keys, where nothing is lost by moving it; their order means nothing.
    order = jnp.argsort(segments.kv == 0, axis=1, stable=True)
    real = (jnp.arange(k.shape[1]) < lengths[:, None])[:, :, None, None]
    k, v = (jnp.where(real, jnp.take_along_axis(x, order[:, :, None, None], axis=1), 0) for x in (k, v))
    seen = (segments.q != 0)[:, :, None, None] & (lengths > 0)[:, None, None, None]
    q = jnp.where(seen, q, 0)
    # The kernel is given one key at least.
    many = jnp.maximum(lengths, 1)
    return jnp.where(seen, jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=many, implementation="cudnn"), 0)


def _masked(q: Array, k: Array, v: Array, segments: Segments) -> Array:
    """cuDNN with a bias. Its backward wants even lengths then, and rows without keys come out as a mean."""
    n = q.shape[1]
    q, k, v = (pad(a, 1, 2) for a in (q, k, v))
    mask = allowed(segments.each(lambda a: pad(a, 1, 2)))
    o = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], o, 0)[:, :n]
