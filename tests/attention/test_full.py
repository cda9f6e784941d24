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
from vgjax.attention.segments import Segments, among

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


@jax.custom_vjp
def undefined_gradient_past(lengths, x):
    return x


undefined_gradient_past.defvjp(
    lambda lengths, x: (x, lengths),
    lambda lengths, g: (
        None,
        jnp.where(jnp.arange(g.shape[1])[:, None, None] < lengths[:, None, None, None], g, jnp.nan),
    ),
)


@pytest.fixture
def kernel(monkeypatch):
    """What cuDNN is asked, answered by XLA; NaN where cuDNN promises nothing."""
    calls = []

    def answer(q, k, v, mask=None, key_value_seq_lengths=None, implementation=None):
        assert implementation == "cudnn" and (mask is None or not (q.shape[1] % 2 or k.shape[1] % 2))
        calls.append("mask" if mask is not None else "lengths" if key_value_seq_lengths is not None else "all")
        if calls[-1] == "lengths":
            k, v = (undefined_gradient_past(key_value_seq_lengths, x) for x in (k, v))
        return original(q, k, v, mask=mask, key_value_seq_lengths=key_value_seq_lengths, implementation="xla")

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    monkeypatch.setattr(full, "platform", lambda: "gpu")
    return calls


def test_gpu_takes_the_fused_kernel_in_half_precision_and_hides_what_padding_would_break(kernel):
    half = tuple(a.astype(jnp.bfloat16) for a in inputs())
    for segments in SEGMENTS.values():
        o = Full()(*half, segments)
        assert o.dtype == jnp.bfloat16
        np.testing.assert_allclose(o.astype(jnp.float32), naive_attention(*inputs(), segments), atol=0.1)
    assert kernel == ["all" if s is None else "mask" for s in SEGMENTS.values()]
    Full()(*inputs())  # fp32 is none of cuDNN's business
    Full()(*(a[..., :6] for a in half))  # nor is a head of 6
    assert len(kernel) == len(SEGMENTS)


def test_a_long_sequence_on_gpu_needs_no_mask_where_a_sample_is_one_segment_and_padding(kernel, monkeypatch):
    monkeypatch.setattr(full, "SMALL_BIAS", 0)

    def self_attention(ids):
        return Segments(*(jnp.stack([ids(0, jnp.arange(n)), ids(1, jnp.arange(n))]).astype(jnp.int32) for n in (N, M)))

    single = {
        "nothing": self_attention(lambda b, i: i >= 0),
        "behind": self_attention(lambda b, i: i < [N, 4][b]),
        "a whole sample": self_attention(lambda b, i: i < [N, 0][b]),
        "in front": self_attention(lambda b, i: 2 * (i >= 3)),
        "between": self_attention(lambda b, i: i % (3 + b) != 1),
    }
    several = {"two segments": self_attention(lambda b, i: 1 + (i > 4))}

    def attention(q, k, v, segments):
        half = (x.astype(jnp.bfloat16) for x in (q, k, v))
        return Full(chunk=4)(*half, segments).astype(jnp.float32)

    for large, asked in ((0, {"lengths"}), (2**31, {"lengths", "mask"})):
        monkeypatch.setattr(full, "LARGE_BIAS", large)
        for name, segments in (single | several).items():
            assert bool(full._is_single(segments)) == (name in single), name
            ours = value_and_gradients(partial(attention, segments=segments), *inputs())
            theirs = value_and_gradients(partial(naive_attention, segments=segments), *inputs())
            for one, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(one, other, atol=0.1, err_msg=name)
        assert set(kernel) == asked


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
    o = Full()(q, q, q, among(mask.astype(jnp.int32)))
    np.testing.assert_allclose(o[1:, :4], Full()(q[1:, :4], q[1:, :4], q[1:, :4]), atol=1e-5)
    np.testing.assert_array_equal(o[1, 4:], 0)
