"""Integrators of `dx/dt = v(x, t)` from t=0 (noise) to t=1 (data), one `lax.scan` inside `jit`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange

from vgjax.typing import Array, Float, PyTree

Velocity = Callable[[Float[Array, "b ..."], Float[Array, ""]], Float[Array, "b ..."]]


@dataclasses.dataclass(frozen=True)
class Euler:
    """First order, one velocity a step; the default of every rectified-flow model."""

    evaluations = 1

    def init(self, x: Float[Array, "b ..."]) -> PyTree:
        return ()

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: PyTree) -> tuple[Array, PyTree]:
        return x + (t1 - t0) * v(x, t0), state


@dataclasses.dataclass(frozen=True)
class Heun:
    """Second order: the mean of the slopes at both ends."""

    evaluations = 2

    def init(self, x: Float[Array, "b ..."]) -> PyTree:
        return ()

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: PyTree) -> tuple[Array, PyTree]:
        v0 = v(x, t0)
        v1 = v(x + (t1 - t0) * v0, t1)
        return x + (t1 - t0) * 0.5 * (v0 + v1), state


@dataclasses.dataclass(frozen=True)
class Midpoint:
    """Second order: the slope in the middle."""

    evaluations = 2

    def init(self, x: Float[Array, "b ..."]) -> PyTree:
        return ()

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: PyTree) -> tuple[Array, PyTree]:
        middle = x + 0.5 * (t1 - t0) * v(x, t0)
        return x + (t1 - t0) * v(middle, 0.5 * (t0 + t1)), state


@dataclasses.dataclass(frozen=True)
class Churn:
    """Euler that before each step goes `back` by a share of t and fills up with new noise, while t is below `until`.

    What an early step got wrong is so decided once more (Karras et al. 2022, algorithm 2; Xu et al. 2023): a model with
    little training behind it follows more of its captions. Takes more steps than Euler. A sample's noise comes of keys
    made from where it starts, so it depends on seed and index alone, on any number of devices.
    """

    back: float = 0.2
    until: float = 0.6
    evaluations = 1

    def init(self, x: Float[Array, "b ..."]) -> PyTree:
        first = rearrange(x, "b ... -> b (...)")[:, 0]
        return jax.vmap(jax.random.key)(jax.lax.bitcast_convert_type(first, jnp.uint32)), jnp.zeros((), jnp.int32)

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: PyTree) -> tuple[Array, PyTree]:
        keys, number = state
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), x.shape[1:]))(keys)
        s = jnp.where(t0 < self.until, (1.0 - self.back) * t0, t0)
        kept = jnp.where(t0 > 0, s / jnp.maximum(t0, 1e-6), 1.0)  # of the data and of the old noise
        x = kept * x + jnp.sqrt(jnp.maximum((1.0 - s) ** 2 - (kept * (1.0 - t0)) ** 2, 0.0)) * noise
        return x + (t1 - s) * v(x, s), (keys, number + 1)


STEPPERS = {"euler": Euler, "heun": Heun, "midpoint": Midpoint, "churn": Churn}


def integrate(
    stepper: Euler | Heun | Midpoint | Churn, v: Velocity, x: Float[Array, "b ..."], times: Float[Array, " k"]
) -> Float[Array, "b ..."]:
    """Follows `v` from `x` at `times[0]` to `times[-1]`; the state is fp32 whatever the model computes in."""

    def body(carry: tuple[Array, PyTree], interval: tuple[Array, Array]) -> tuple[tuple[Array, PyTree], None]:
        x, state = carry
        x, state = stepper.step(v, x, *interval, state)
        return (x, state), None

    x = x.astype(jnp.float32)
    (x, _), _ = jax.lax.scan(body, (x, stepper.init(x)), (times[:-1], times[1:]))
    return x
