"""Integrators: their order of convergence, and the paths they must follow exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.flow.steppers import STEPPERS, Churn, Euler, integrate

ORDERS = [("euler", 1), ("heun", 2), ("midpoint", 2)]


@pytest.mark.parametrize("name,order", ORDERS)
def test_error_falls_with_the_order(name, order):
    def v(x, t):
        return -2 * t * x + jnp.exp(-(t**2)) * jnp.cos(t)  # solved by exp(-t^2) (x0 + sin t)

    @functools.partial(jax.jit, static_argnums=0)
    def follow(n):
        stepper, times = STEPPERS[name](), jnp.linspace(0.0, 1.0, n + 1, dtype=jnp.float64)
        body = lambda x, at: (stepper.step(v, x, *at, stepper.init(x))[0], None)  # noqa: E731
        return jax.lax.scan(body, jnp.ones((1,), jnp.float64), (times[:-1], times[1:]))[0][0]

    with jax.enable_x64(True):
        errors = [abs(float(follow(n)) - np.exp(-1) * (1 + np.sin(1))) for n in (64, 128, 256)]
    for coarse, finer in zip(errors, errors[1:], strict=False):
        assert abs(np.log2(coarse / finer) - order) < 0.1


@pytest.mark.parametrize("name", [name for name, _ in ORDERS])
def test_a_straight_path_is_exact_in_any_number_of_steps(name):
    noise, data = jax.random.normal(jax.random.key(0), (2, 4, 3))
    for steps in (1, 3, 10):
        out = integrate(STEPPERS[name](), lambda x, t: data - noise, noise, jnp.linspace(0, 1, steps + 1))
        np.testing.assert_allclose(out, data, atol=1e-5)


def test_euler_takes_one_velocity_a_step_at_its_start():
    seen = []

    def v(x, t):
        jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
        return jnp.ones_like(x)

    integrate(Euler(), v, jnp.zeros((1,)), jnp.array([0.0, 0.2, 0.6, 1.0])).block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [0.0, 0.2, 0.6], atol=1e-6)


def test_churn_reaches_the_data_and_forgets_the_noise():
    noise, data = jax.random.normal(jax.random.key(0), (2, 4, 3))
    out = integrate(Churn(), lambda x, t: (data - x) / (1 - t), noise, jnp.linspace(0, 1, 11))
    np.testing.assert_allclose(out, data, atol=1e-5)


@pytest.mark.parametrize("stepper", [Euler(), Churn()], ids=str)
def test_samples_have_the_mean_and_spread_of_the_data(stepper):
    mean, std = 0.7, 0.3

    def v(x, t):  # exact for data of this normal law
        variance = (t * std) ** 2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)

    noise = jax.random.normal(jax.random.key(0), (20_000, 1))
    out = jax.jit(lambda x: integrate(stepper, v, x, jnp.linspace(0, 1, 201)))(noise)
    assert abs(float(out.mean()) - mean) < 0.01 and abs(float(out.std()) - std) < 0.01


def test_churn_draws_its_noise_for_each_sample_alone():
    noise, times = jax.random.normal(jax.random.key(0), (4, 3)), jnp.linspace(0, 1, 6)
    together = integrate(Churn(), lambda x, t: -x, noise, times)
    np.testing.assert_array_equal(together[2:], integrate(Churn(), lambda x, t: -x, noise[2:], times))
    assert jnp.max(jnp.abs(together - integrate(Euler(), lambda x, t: -x, noise, times))) > 0.1
