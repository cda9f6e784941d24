"""Every form of full attention equals softmax(q k / sqrt(k)) v, in value and gradient, padding included."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import naive_attention, value_and_gradients
from einops import rearrange

from vgjax.attention import full
from vgjax.attention.full import Full
from vgjax.attention.segments import Segments, padding

FORMS = {
    "batched": full._batched,
    "chunks": partial(full._by_chunks, chunk=4),
    "chunks that do not divide": partial(full._by_chunks, chunk=5),
    "heads": partial(full._by_heads, chunk=100),
    "heads in chunks": partial(full._by_heads, chunk=3),
}
B, N, M, H, K = 2, 11, 7, 3, 8
SEGMENTS = {
    "none": None,
    "padded": Segments(jnp.ones((B, N), jnp.int32), jnp.array([[1] * M, [1, 0, 1, 1, 0, 0, 0]])),
    "packed": Segments(jnp.arange(B * N).reshape(B, N) // 3 % 3, jnp.arange(B * M).reshape(B, M) // 2 % 3),
    "no keys": Segments(jnp.ones((B, N), jnp.int32), jnp.stack([jnp.zeros(M, jnp.int32), jnp.ones(M, jnp.int32)])),
}


def inputs():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, N, H, K), (B, M, H, K), (B, M, H, K))
    return tuple(2 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


@pytest.fixture(scope="module")
def expected():
    return {
        name: value_and_gradients(lambda q, k, v, s=segments: naive_attention(q, k, v, s), *inputs())
        for name, segments in SEGMENTS.items()
    }


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("form", FORMS)
def test_form_equals_naive_attention(form, segments, expected):
    @jax.jit
    def attention(q, k, v):
        q, k, v = (rearrange(a, "b n h k -> b h n k") for a in (q, k, v))
        return rearrange(FORMS[form](q, k, v, SEGMENTS[segments]), "b h n k -> b n h k")

    for ours, theirs in zip(value_and_gradients(attention, *inputs()), expected[segments], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("small", [0, full.SMALL])
def test_full_equals_naive_attention_on_every_platform_in_fp32(platform, small, expected, monkeypatch):
    monkeypatch.setattr(full, "platform", lambda: platform)
    monkeypatch.setattr(full, "SMALL", small)
    for name, segments in SEGMENTS.items():
        np.testing.assert_allclose(Full(chunk=4)(*inputs(), segments), expected[name][0], atol=2e-5)


def test_gpu_takes_the_fused_kernel_in_half_precision_and_hides_what_padding_would_break(monkeypatch):
    calls = []

    def kernel(q, k, v, mask=None, implementation=None):
        assert implementation == "cudnn" and (mask is None or not (q.shape[1] % 2 or k.shape[1] % 2))
        calls.append(mask)
        return original(q, k, v, mask=mask, implementation="xla")

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr(full, "platform", lambda: "gpu")
    half = tuple(a.astype(jnp.bfloat16) for a in inputs())
    for segments in SEGMENTS.values():
        o = Full()(*half, segments)
        assert o.dtype == jnp.bfloat16
        np.testing.assert_allclose(o.astype(jnp.float32), naive_attention(*inputs(), segments), atol=0.1)
    assert len(calls) == len(SEGMENTS)
    Full()(*inputs())  # fp32 is none of cuDNN's business
    Full()(*(a[..., :6] for a in half))  # nor is a head of 6
    assert len(calls) == len(SEGMENTS)


def test_scores_are_softmaxed_in_fp32():
    q = jnp.full((1, 1, 1, 2), 16.0, jnp.bfloat16)
    k = jnp.array([[[[16.0, 16.0]], [[16.0, 15.875]]]], jnp.bfloat16)
    v = jnp.array([[[[1.0, 0.0]], [[0.0, 1.0]]]], jnp.bfloat16)
    o = Full()(q, k, v)
    np.testing.assert_allclose(o[0, 0, 0, 0].astype(jnp.float32), jax.nn.sigmoid(16 * 0.125 / 2**0.5), atol=1e-2)


def test_huge_scores_stay_finite():
    q, k, v = inputs()
    o = Full()(1e4 * q, 1e4 * k, v, SEGMENTS["padded"])
    assert jnp.all(jnp.isfinite(o))


def test_padding_is_seen_by_nobody():
    mask = jnp.arange(N)[None] < jnp.array([[N], [4]])
    q, _, _ = inputs()
    o = Full()(q, q, q, padding(mask))
    np.testing.assert_allclose(o[1:, :4], Full()(q[1:, :4], q[1:, :4], q[1:, :4]), atol=1e-5)
    np.testing.assert_array_equal(o[1, 4:], 0)
