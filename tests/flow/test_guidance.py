"""Classifier-free guidance as a map from velocity to velocity."""

import jax.numpy as jnp
import numpy as np

from vgjax.flow.guidance import cfg


def velocity(x, t, memory):
    """The conditional half moves by 2x + 1, the other by x; calls are counted."""
    velocity.batches.append(x.shape[0])
    half = x.shape[0] // 2
    return jnp.concatenate([2 * x[:half] + 1, x[half:]]), memory + 1


velocity.batches = []


def guided(t, *args, **options):
    """Guided at X; the velocity's memory comes back."""
    out, memory = cfg(velocity, *args, **options)(X, jnp.float32(t), 1)
    assert memory == 2
    return out


X = jnp.linspace(-1.0, 2.0, 12).reshape(2, 6)


def test_scale_one_is_the_conditional_and_zero_the_other():
    np.testing.assert_allclose(guided(0.5, 1.0), 2 * X + 1, atol=1e-6)
    np.testing.assert_allclose(guided(0.5, 0.0), X, atol=1e-6)


def test_guidance_extrapolates_and_takes_one_forward_of_a_doubled_batch():
    velocity.batches.clear()
    np.testing.assert_allclose(guided(0.5, 3.0), X + 3 * (X + 1), atol=1e-5)
    assert velocity.batches == [4]


def test_outside_the_interval_the_conditional_is_used_alone():
    for t in (0.1, 0.7):
        np.testing.assert_allclose(guided(t, 3.0, interval=(0.2, 0.6)), 2 * X + 1, atol=1e-6)
    np.testing.assert_allclose(guided(0.4, 3.0, interval=(0.2, 0.6)), X + 3 * (X + 1), atol=1e-5)


def test_full_rescale_has_the_deviation_of_the_conditional():
    out = guided(0.5, 5.0, rescale=1.0)
    np.testing.assert_allclose(out.std(-1), (2 * X + 1).std(-1), rtol=1e-4)
