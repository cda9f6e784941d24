"""Pairs add up to the mean of everything."""

import jax.numpy as jnp
import numpy as np

from vgjax.losses.mean import pair


def test_pairs_of_parts_add_up_to_the_mean_of_the_whole():
    values = jnp.arange(7.0)
    total = pair(values[:2]) + pair(values[2:])
    assert total.dtype == jnp.float32
    np.testing.assert_array_equal(total, [21.0, 7.0])


def test_weights_choose_what_counts_and_what_does_not_count_cannot_poison():
    values = jnp.asarray([1.0, jnp.nan, 5.0])
    np.testing.assert_array_equal(pair(values, jnp.asarray([1.0, 0.0, 2.0])), [11.0, 3.0])
    np.testing.assert_array_equal(pair(values[:1], jnp.zeros(1)), [0.0, 0.0])


def test_sums_are_fp32_whatever_comes_in():
    assert pair(jnp.full(1000, 1.001, jnp.bfloat16)).dtype == jnp.float32
    np.testing.assert_array_equal(pair(jnp.asarray([True, False])), [1.0, 2.0])
