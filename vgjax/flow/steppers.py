"""Integrators of `dx/dt = v(x, t)` from t=0 (noise) to t=1 (data), one `lax.scan` inside `jit`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

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


STEPPERS = {"euler": Euler, "heun": Heun, "midpoint": Midpoint}


def integrate(
    stepper: Euler | Heun | Midpoint, v: Velocity, x: Float[Array, "b ..."], times: Float[Array, " k"]
) -> Float[Array, "b ..."]:
    """Follows `v` from `x` at `times[0]` to `times[-1]`; the state is fp32 whatever the model computes in."""

    def body(carry: tuple[Array, PyTree], interval: tuple[Array, Array]) -> tuple[tuple[Array, PyTree], None]:
        x, state = carry
        x, state = stepper.step(v, x, *interval, state)
        return (x, state), None

    x = x.astype(jnp.float32)
    (x, _), _ = jax.lax.scan(body, (x, stepper.init(x)), (times[:-1], times[1:]))
    return x
