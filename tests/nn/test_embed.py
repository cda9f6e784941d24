"""Scalars as vectors."""

import jax
import jax.numpy as jnp
import numpy as np

from vgjax.nn.embed import ScalarEmbed, sinusoidal


def test_first_half_is_cosines_second_half_sines_of_the_same_angles():
    x = jnp.array([0.0, 0.3, 17.0])
    first, second = jnp.split(sinusoidal(x, 8), 2, axis=-1)
    angles = np.asarray(x)[:, None] * 1e4 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(first, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(second, np.sin(angles), atol=1e-6)


def test_nearby_times_are_told_apart_and_far_ones_are_farther():
    module = ScalarEmbed(32)
    t = jnp.array([0.5, 0.501, 0.9])
    a, b, c = module.apply(module.init(jax.random.key(0), t), t)
    assert 0 < jnp.linalg.norm(a - b) < jnp.linalg.norm(a - c)
