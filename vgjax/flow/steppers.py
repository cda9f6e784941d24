"""Integrators of `dx/dt = v(x, t)` from t=0 (noise) to t=1 (data), one `lax.scan` inside `jit`.

A velocity has a memory, a pytree that it returns with every value (a cache; None where it remembers nothing). It
travels in the stepper's `State`, so a step that evaluates the velocity twice hands it on from the first to the second.
"""

import dataclasses
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vgjax.errors import UserError
from vgjax.typing import Array, Float, Int, Key, PyTree


@runtime_checkable
class Velocity(Protocol):
    """`v(x, t, memory) -> (dx/dt, memory)`; `t` is a scalar or one a sample."""

    def __call__(self, x: Array, t: Array, memory: PyTree) -> tuple[Array, PyTree]: ...


class State(NamedTuple):
    """What goes from step to step: the method's own arrays, and the memory of the velocity.

    Holds no typed keys, so that it can lie on the host between two models.
    """

    own: PyTree
    memory: PyTree = None


@runtime_checkable
class Stepper(Protocol):
    """A method of integration, a frozen dataclass. evaluations: of the velocity, a step."""

    evaluations: ClassVar[int]

    def init(self, x: Array, key: Key) -> State:
        """The state before the first step; key: one for each sample."""

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: State) -> tuple[Array, State]:
        """`x` at t1 from `x` at t0."""


@dataclasses.dataclass(frozen=True)
class Euler:
    """First order, one velocity a step; the default of every rectified-flow model."""

    evaluations: ClassVar[int] = 1

    def init(self, x: Float[Array, "b ..."], key: Key) -> State:
        return State(())

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: State) -> tuple[Array, State]:
        slope, memory = v(x, t0, state.memory)
        return x + (t1 - t0) * slope, State((), memory)


@dataclasses.dataclass(frozen=True)
class Heun:
    """Second order: the mean of the slopes at both ends."""

    evaluations: ClassVar[int] = 2

    def init(self, x: Float[Array, "b ..."], key: Key) -> State:
        return State(())

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: State) -> tuple[Array, State]:
        v0, memory = v(x, t0, state.memory)
        v1, memory = v(x + (t1 - t0) * v0, t1, memory)
        return x + (t1 - t0) * 0.5 * (v0 + v1), State((), memory)


@dataclasses.dataclass(frozen=True)
class Midpoint:
    """Second order: the slope in the middle."""

    evaluations: ClassVar[int] = 2

    def init(self, x: Float[Array, "b ..."], key: Key) -> State:
        return State(())

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: State) -> tuple[Array, State]:
        slope, memory = v(x, t0, state.memory)
        slope, memory = v(x + 0.5 * (t1 - t0) * slope, 0.5 * (t0 + t1), memory)
        return x + (t1 - t0) * slope, State((), memory)


@dataclasses.dataclass(frozen=True)
class Churn:
    """Euler that before each step goes `back` by a share of t and fills up with new noise, while t is below `until`.

    What an early step got wrong is so decided once more (Karras et al. 2022, algorithm 2; Xu et al. 2023): a model with
    little training behind it follows more of its captions. Takes more steps than Euler. A sample's noise comes of its
    own key, so it depends on seed and index alone, on any number of devices.
    """

    back: float = 0.2
    until: float = 0.6
    evaluations: ClassVar[int] = 1

    def init(self, x: Float[Array, "b ..."], key: Key) -> State:
        return State(jax.random.key_data(key))

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: State) -> tuple[Array, State]:
        keys = jax.vmap(jax.random.split)(jax.random.wrap_key_data(state.own))
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys[:, 0])
        s = jnp.where(t0 < self.until, (1.0 - self.back) * t0, t0)
        kept = jnp.where(t0 > 0, s / jnp.maximum(t0, 1e-6), 1.0)  # of the data and of the old noise
        x = kept * x + jnp.sqrt(jnp.maximum((1.0 - s) ** 2 - (kept * (1.0 - t0)) ** 2, 0.0)) * noise
        slope, memory = v(x, s, state.memory)
        return x + (t1 - s) * slope, State(jax.random.key_data(keys[:, 1]), memory)


@dataclasses.dataclass(frozen=True)
class AdamsBashforth:
    """Second order, one velocity a step, which is extrapolated from the last two; the first step is Euler's."""

    evaluations: ClassVar[int] = 1

    def init(self, x: Float[Array, "b ..."], key: Key) -> State:
        return State((jnp.zeros_like(x), jnp.full((), -1.0, x.dtype)))  # a time before all times: no slope yet

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: State) -> tuple[Array, State]:
        before, at = state.own
        slope, memory = v(x, t0, state.memory)
        share = jnp.where(at < 0, 0.0, 0.5 * (t1 - t0) / (t0 - at))
        return x + (t1 - t0) * (slope + share * (slope - before)), State((slope, t0.astype(at.dtype)), memory)


class Past(NamedTuple):
    """Of the last steps: where the last one started, the data predicted there and a step earlier, the times of both."""

    x: Float[Array, "b ..."]
    data: Float[Array, "b ..."]
    earlier: Float[Array, "b ..."]
    at: Float[Array, ""]
    at_earlier: Float[Array, ""]
    steps: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class UniPC:
    """Predictor and corrector of Zhao et al. 2023, B(h) = e^h - 1, one velocity a step.

    Second order from noise to data, third between times within. The predicted data are integrated in the half log-SNR
    `lambda = log(t / (1 - t))`: where they are constant a step is exact. Each velocity first corrects the step that led
    to it, then predicts the next one. The predictor has second order, in the first step and the one that ends at t=1,
    where lambda is infinite, first.
    """

    evaluations: ClassVar[int] = 1

    def init(self, x: Float[Array, "b ..."], key: Key) -> State:
        nothing, never = jnp.zeros_like(x), jnp.zeros((), x.dtype)
        return State(Past(nothing, nothing, nothing, never, never, jnp.zeros((), jnp.int32)))

    def step(self, v: Velocity, x: Array, t0: Array, t1: Array, state: State) -> tuple[Array, State]:
        past: Past = state.own
        slope, memory = v(x, t0, state.memory)
        data = x + (1.0 - t0) * slope
        x = jnp.where(past.steps > 0, _corrected(past, t0, data), x)
        at = t0.astype(past.at.dtype)
        past = Past(x, data, past.data, at, past.at, past.steps + 1)
        return _predicted(past, t1), State(past, memory)


def _predicted(past: Past, t: Array) -> Array:
    second = (past.steps > 1) & (t < 1.0)
    _, ratio = _intervals(past, t)
    bend = jnp.where(second, 0.5 / jnp.where(second, ratio, -1.0), 0.0)
    return _moved(past, t, past.data + bend * (past.earlier - past.data))


def _corrected(past: Past, t: Array, data: Array) -> Array:
    """`x` at t, now that the data predicted there are known; of the order of the step that led there."""
    second = past.steps > 1
    h, ratio = _intervals(past, t)
    h, ratio = jnp.where(past.steps > 0, h, 1.0), jnp.where(second, ratio, -1.0)
    phi = jnp.expm1(-h)
    of_first = phi / -h - 1.0
    sides = of_first / phi, 2.0 * (of_first / -h - 0.5) / phi
    bend = jnp.where(second, (sides[0] - sides[1]) / (1.0 - ratio), 0.0)
    new = jnp.where(second, sides[0] - bend, 0.5)
    return _moved(past, t, past.data + bend / ratio * (past.earlier - past.data) + new * (data - past.data))


def _moved(past: Past, t: Array, data: Array) -> Array:
    """From the last step to t, straight towards `data`."""
    return ((1.0 - t) * past.x + (t - past.at) * data) / (1.0 - past.at)


def _intervals(past: Past, t: Array) -> tuple[Array, Array]:
    """The step in lambda, and in units of it the one before, which is negative."""
    h = _half_log_snr(t) - _half_log_snr(past.at)
    return h, (_half_log_snr(past.at_earlier) - _half_log_snr(past.at)) / h


def _half_log_snr(t: Array) -> Array:
    # Pure noise has no finite one: the reference samplers start 1e-6 behind it.
    return jnp.log(jnp.maximum(t, 1e-6)) - jnp.log(1.0 - t)


STEPPERS: dict[str, type[Stepper]] = {
    "euler": Euler,
    "heun": Heun,
    "midpoint": Midpoint,
    "churn": Churn,
    "ab2": AdamsBashforth,
    "unipc": UniPC,
}


def named(name: str) -> Stepper:
    """The stepper of this name, as it is by default."""
    if name not in STEPPERS:
        raise UserError(f"stepper={name!r} is unknown: use one of {', '.join(STEPPERS)}")
    return STEPPERS[name]()


def integrate(
    stepper: Stepper, v: Velocity, x: Float[Array, "b ..."], times: Float[Array, " k"], key: Key
) -> Float[Array, "b ..."]:
    """Follows `v` from `x` at `times[0]` to `times[-1]`; the state is fp32 whatever the model computes in.

    key: one for each sample, of its global index alone (see `flow.path.sample_keys`).
    """
    x = x.astype(jnp.float32)
    return advance(stepper, v, x, times, stepper.init(x, key))[0]


def advance(
    stepper: Stepper, v: Velocity, x: Float[Array, "b ..."], times: Float[Array, " k"], state: State
) -> tuple[Float[Array, "b ..."], State]:
    """As `integrate` from a state on, for where one velocity takes over from another: (`x` at the last time, state)."""

    def body(carry: tuple[Array, State], interval: tuple[Array, Array]) -> tuple[tuple[Array, State], None]:
        x, state = carry
        return stepper.step(v, x, *interval, state), None

    return jax.lax.scan(body, (x, state), (times[:-1], times[1:]))[0]
