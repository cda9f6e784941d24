"""Classifier-free guidance as a map from velocity to velocity."""

import jax.numpy as jnp
import numpy as np

from vgjax.flow.guidance import cfg


def velocity(x, t):
    """The conditional half moves by 2x + 1, the other by x; calls are counted."""
    velocity.batches.append(x.shape[0])
    half = x.shape[0] // 2
    return jnp.concatenate([2 * x[:half] + 1, x[half:]])


velocity.batches = []
X = jnp.linspace(-1.0, 2.0, 12).reshape(2, 6)


def test_scale_one_is_the_conditional_and_zero_the_other():
    np.testing.assert_allclose(cfg(velocity, 1.0)(X, jnp.float32(0.5)), 2 * X + 1, atol=1e-6)
    np.testing.assert_allclose(cfg(velocity, 0.0)(X, jnp.float32(0.5)), X, atol=1e-6)


def test_guidance_extrapolates_and_takes_one_forward_of_a_doubled_batch():
    velocity.batches.clear()
    np.testing.assert_allclose(cfg(velocity, 3.0)(X, jnp.float32(0.5)), X + 3 * (X + 1), atol=1e-5)
    assert velocity.batches == [4]


def test_outside_the_interval_the_conditional_is_used_alone():
    guided = cfg(velocity, 3.0, interval=(0.2, 0.6))
    for t in (0.1, 0.7):
        np.testing.assert_allclose(guided(X, jnp.float32(t)), 2 * X + 1, atol=1e-6)
    np.testing.assert_allclose(guided(X, jnp.float32(0.4)), X + 3 * (X + 1), atol=1e-5)


def test_full_rescale_has_the_deviation_of_the_conditional():
    out = cfg(velocity, 5.0, rescale=1.0)(X, jnp.float32(0.5))
    np.testing.assert_allclose(out.std(-1), (2 * X + 1).std(-1), rtol=1e-4)
