"""Integrators: their order of convergence, the paths they must follow exactly, and the memory they carry."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vgjax.errors import UserError
from vgjax.flow import schedule
from vgjax.flow.path import stepper_keys
from vgjax.flow.steppers import STEPPERS, AdamsBashforth, Churn, Euler, Stepper, UniPC, advance, integrate, named

ORDERS = [("euler", 1), ("heun", 2), ("midpoint", 2), ("ab2", 2), ("unipc", 3)]  # between times within
KEYS = stepper_keys(jax.random.key(0), jnp.arange(4, dtype=jnp.uint32))


def errors(name, first, last, bend, counts):
    """Of `x' = -2 t x + exp(-t^2) cos t`, solved by exp(-t^2) (x0 + sin t), in so many steps."""
    solution = lambda t: np.exp(-(t**2)) * (1 + np.sin(t))  # noqa: E731
    v = lambda x, t, memory: (-2 * t * x + jnp.exp(-(t**2)) * jnp.cos(t), memory)  # noqa: E731

    @functools.partial(jax.jit, static_argnums=0)
    def follow(n):
        stepper, x = named(name), jnp.full((1,), solution(first))
        times = first + (last - first) * jnp.linspace(0.0, 1.0, n + 1, dtype=jnp.float64) ** bend
        return advance(stepper, v, x, times, stepper.init(x, KEYS[:1]))[0][0]

    with jax.enable_x64(True):
        return [abs(float(follow(n)) - solution(last)) for n in counts]


@pytest.mark.parametrize("name,order", ORDERS)
@pytest.mark.parametrize("bend", [1.0, 1.5])  # even times, and uneven ones
def test_error_falls_with_the_order(name, order, bend):
    found = errors(name, 0.1, 0.9, bend, (64, 128, 256))
    for coarse, finer in zip(found, found[1:], strict=False):
        assert abs(np.log2(coarse / finer) - order) < 0.1


@pytest.mark.parametrize("name,order", [(name, min(order, 2)) for name, order in ORDERS])
def test_error_falls_with_the_order_from_noise_to_data(name, order):
    coarse, finer = errors(name, 0.0, 1.0, 1.0, (128, 1024))
    assert np.log2(coarse / finer) / 3 > order - 0.1


@pytest.mark.parametrize("name", [name for name, _ in ORDERS])
def test_a_straight_path_is_exact_in_any_number_of_steps(name):
    noise, data = jax.random.normal(jax.random.key(0), (2, 4, 3))
    for steps in (1, 3, 10):
        times = jnp.linspace(0, 1, steps + 1)
        out = integrate(named(name), lambda x, t, memory: (data - noise, memory), noise, times, KEYS)
        np.testing.assert_allclose(out, data, atol=1e-5)


@pytest.mark.parametrize("name", STEPPERS)
def test_a_memory_goes_through_every_evaluation(name):
    stepper, x = named(name), jnp.ones((4, 3))
    state = stepper.init(x, KEYS)._replace(memory=jnp.int32(0))
    _, state = advance(stepper, lambda x, t, n: (-x, n + 1), x, jnp.linspace(0, 1, 4), state)
    assert isinstance(stepper, Stepper) and state.memory == 3 * stepper.evaluations


@pytest.mark.parametrize("name", STEPPERS)
def test_a_path_may_be_followed_in_two_parts(name):
    stepper, x, times = named(name), jax.random.normal(jax.random.key(0), (4, 3)), jnp.linspace(0, 1, 8)
    v = lambda x, t, memory: (jnp.sin(3 * x) + t, memory)  # noqa: E731
    half, state = advance(stepper, v, x, times[:4], stepper.init(x, KEYS))
    both, _ = advance(stepper, v, half, times[3:], jax.tree.map(np.asarray, state))  # over the host
    np.testing.assert_allclose(both, integrate(stepper, v, x, times, KEYS), atol=1e-6)


@pytest.mark.parametrize("stepper", [Euler(), AdamsBashforth(), UniPC()], ids=str)
def test_a_method_of_one_velocity_asks_for_it_at_the_start_of_each_step(stepper):
    seen = []

    def v(x, t, memory):
        jax.debug.callback(lambda t: seen.append(float(t)), t, ordered=True)
        return jnp.ones_like(x), memory

    integrate(stepper, v, jnp.zeros((1,)), jnp.array([0.0, 0.2, 0.6, 1.0]), KEYS[:1]).block_until_ready()
    jax.effects_barrier()
    np.testing.assert_allclose(seen, [0.0, 0.2, 0.6], atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 30])
def test_unipc_takes_the_steps_of_its_scheduler(steps):
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    theirs.set_timesteps(steps)
    times = schedule.published({"_class_name": type(theirs).__name__, **theirs.config}, steps).times
    noise = jax.random.normal(jax.random.key(0), (4, 3))
    x = torch.from_numpy(np.array(noise))
    for t, sigma in zip(theirs.timesteps, theirs.sigmas, strict=False):
        x = theirs.step(-(torch.sin(3 * x) - sigma * x), t, x).prev_sample
    v = lambda x, t, memory: (jnp.sin(3 * x) - (1 - t) * x, memory)  # noqa: E731
    ours = integrate(UniPC(), v, noise, jnp.asarray(times), KEYS)
    np.testing.assert_allclose(ours, x.numpy(), atol=1e-5)


def test_churn_reaches_the_data_and_forgets_the_noise():
    noise, data = jax.random.normal(jax.random.key(0), (2, 4, 3))
    v = lambda x, t, memory: ((data - x) / (1 - t), memory)  # noqa: E731
    np.testing.assert_allclose(integrate(Churn(), v, noise, jnp.linspace(0, 1, 11), KEYS), data, atol=1e-5)


@pytest.mark.parametrize("stepper", [Euler(), Churn(), UniPC()], ids=str)
def test_samples_have_the_mean_and_spread_of_the_data(stepper):
    mean, std = 0.7, 0.3

    def v(x, t, memory):  # exact for data of this normal law
        variance = (t * std) ** 2 + (1 - t) ** 2
        return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean), memory

    noise = jax.random.normal(jax.random.key(0), (20_000, 1))
    keys = stepper_keys(jax.random.key(0), jnp.arange(20_000, dtype=jnp.uint32))
    out = jax.jit(lambda x: integrate(stepper, v, x, jnp.linspace(0, 1, 201), keys))(noise)
    assert abs(float(out.mean()) - mean) < 0.01 and abs(float(out.std()) - std) < 0.01


def test_churn_draws_for_each_sample_of_its_key_alone():
    times, v = jnp.linspace(0, 1, 6), lambda x, t, memory: (-x, memory)
    same = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 3)), (4, 3))
    together = integrate(Churn(), v, same, times, KEYS)
    np.testing.assert_array_equal(together[2:], integrate(Churn(), v, same[2:], times, KEYS[2:]))
    assert len(np.unique(np.asarray(together), axis=0)) == 4  # not of where they start
    assert jnp.max(jnp.abs(together - integrate(Euler(), v, same, times, KEYS))) > 0.1


def test_an_unknown_stepper_is_named():
    with pytest.raises(UserError, match="'rk9' is unknown: use one of euler, heun, midpoint, churn, ab2, unipc"):
        named("rk9")
