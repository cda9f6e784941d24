"""The straight path and the keys of its noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.errors import UserError
from vgjax.flow.path import Straight, precondition, retimed, sample_keys, seeded, stepper_keys


def test_path_starts_in_noise_ends_in_data_and_moves_at_its_velocity():
    noise, data = jax.random.normal(jax.random.key(0), (2, 3, 2, 4, 4, 5))
    for t, expected in ((0.0, noise), (1.0, data), (0.25, 0.75 * noise + 0.25 * data)):
        x, v = Straight().mix(noise, data, jnp.full((3,), t))
        np.testing.assert_allclose(x, expected, atol=1e-6)
        np.testing.assert_allclose(v, data - noise, atol=1e-6)


def test_every_sample_has_its_own_time():
    noise, data = jnp.zeros((3, 2)), jnp.ones((3, 2))
    x, _ = Straight().mix(noise, data, jnp.array([0.1, 0.5, 0.9]))
    np.testing.assert_allclose(x[:, 0], [0.1, 0.5, 0.9], atol=1e-7)


def test_a_sample_key_depends_on_its_global_index_alone():
    key = jax.random.key(3)
    whole = jax.random.key_data(sample_keys(key, jnp.arange(8, dtype=jnp.uint32)))
    for order in ([5], [7, 0, 5], [5, 4]):
        some = jax.random.key_data(sample_keys(key, jnp.array(order, jnp.uint32)))
        np.testing.assert_array_equal(some, whole[np.array(order)])
    assert len(np.unique(np.asarray(whole), axis=0)) == 8


def test_preconditioned_targets_have_unit_variance_at_every_time_and_a_zero_network_is_the_best_linear_guess():
    noise, data = jax.random.normal(jax.random.key(1), (2, 40_000, 1))
    for t in (0.0, 0.1, 0.5, 0.8, 1.0):
        at = jnp.full((40_000,), t)
        x, velocity = Straight().mix(noise, data, at)
        guess = precondition(lambda x, t, memory: (jnp.zeros_like(x), memory))(x, at, None)[0]
        gain = precondition(lambda x, t, memory: (jnp.ones_like(x), memory))(x, at, None)[0] - guess
        target = (velocity - guess) / gain
        np.testing.assert_allclose(jnp.var(target), 1.0, rtol=0.03)
        np.testing.assert_allclose(jnp.mean(target * x), 0.0, atol=0.03)  # nothing linear is left
    start, memory = precondition(lambda x, t, memory: (x, memory + 1))(x, jnp.float32(0.0), 1)
    np.testing.assert_allclose(start, -x + x, atol=1e-6)
    assert memory == 2


def test_a_network_is_told_its_own_times_and_between_them_what_lies_between():
    v = retimed(lambda x, t, memory: (x + t, memory), jnp.array([0.0, 0.4, 1.0]), jnp.array([0.001, 0.35, 1.0]))
    told = [float(v(jnp.zeros((1,)), jnp.float32(t), None)[0][0]) for t in (0.0, 0.4, 0.7, 1.0)]
    np.testing.assert_allclose(told, [0.001, 0.35, 0.675, 1.0], atol=1e-6)


def test_a_stepper_draws_apart_from_the_noise():
    key, index = jax.random.key(3), jnp.arange(4, dtype=jnp.uint32)
    both = jnp.concatenate([jax.random.key_data(of(key, index)) for of in (sample_keys, stepper_keys)])
    assert len(np.unique(np.asarray(both), axis=0)) == 8


def test_a_seed_of_32_bits_gives_jax_s_key_and_all_64_bits_count():
    for seed in (0, 7, 2**31, 2**32 - 1):
        np.testing.assert_array_equal(jax.random.key_data(seeded(seed)), jax.random.key_data(jax.random.key(seed)))
    seeds = 0, 1, 2**31, 2**32, 2**32 + 1, 2**50, 2**63, 2**64 - 1
    words = {tuple(jax.random.key_data(seeded(seed)).tolist()) for seed in seeds}
    assert len(words) == len(seeds)
    for seed in (-1, 2**64, True):
        with pytest.raises(UserError, match="seed="):
            seeded(seed)
