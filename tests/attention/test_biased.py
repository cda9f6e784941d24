"""Attention with a mask and a bias: the formula, head by head, also for a query that may see nothing."""

import battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.attention.biased import biased, causal


def inputs(h, g, n=5, m=7, k=4):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, *size, k)) for key, size in zip(keys, ((n, h), (m, g), (m, g)), strict=False))
    mask = jax.random.bernoulli(keys[3], 0.6, (2, n, m)).at[1, 2].set(False)
    return q, k, v, mask, jax.random.normal(keys[4], (h, n, m))


@pytest.mark.parametrize("h, g", [(1, 1), (3, 3), (4, 2), (6, 1)])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_equals_the_formula_head_by_head(h, g, scale):
    q, k, v, mask, bias = inputs(h, g)
    o = biased(q, k, v, mask, bias, scale)
    for head in range(h):
        one, of_keys = q[:, :, head], head // (h // g)
        scores = jnp.einsum("bnk,bmk->bnm", one, k[:, :, of_keys]) * (scale or q.shape[-1] ** -0.5) + bias[head]
        weights = jnp.exp(scores) * mask
        total = jnp.sum(weights, axis=-1, keepdims=True)
        expected = weights @ v[:, :, of_keys] / jnp.where(total == 0, 1, total)
        np.testing.assert_allclose(o[:, :, head], expected, atol=1e-5)


def test_without_mask_and_bias_it_is_plain_attention():
    q, k, v, *_ = inputs(3, 3)
    np.testing.assert_allclose(biased(q, k, v), battery.naive_attention(q, k, v), atol=1e-5)


def test_a_query_that_may_see_nothing_gets_0_and_finite_gradients():
    q, k, v, mask, bias = inputs(4, 2)
    o, *gradients = battery.value_and_gradients(lambda q, k, v: biased(q, k, v, mask, bias), q, k, v)
    np.testing.assert_array_equal(o[1, 2], 0)
    np.testing.assert_array_equal(gradients[0][1, 2], 0)
    assert all(jnp.all(jnp.isfinite(gradient)) for gradient in gradients)


def test_causal_shows_real_tokens_up_to_oneself():
    mask = causal(jnp.array([[True, False, True]]))
    np.testing.assert_array_equal(mask[0], [[1, 0, 0], [1, 0, 0], [1, 0, 1]])
