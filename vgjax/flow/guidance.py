"""Classifier-free guidance as a map from Velocity to Velocity (Ho & Salimans 2022)."""

import jax.numpy as jnp

from vgjax.errors import UserError
from vgjax.flow.steppers import Velocity
from vgjax.typing import Array, Float, PyTree


def check(interval: tuple[float, float], rescale: float) -> None:
    """A `UserError` for what `cfg` cannot do."""
    if not 0 <= rescale <= 1:
        raise UserError(f"rescale={rescale} must be in [0, 1]")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise UserError(f"interval={interval} must be two times, 0 <= first < second <= 1")


def cfg(v: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0), rescale: float = 0.0) -> Velocity:
    """Guides `v`, a velocity of a doubled batch (conditional half first), by `u + scale (c - u)`.

    Both halves run in one forward, with one memory of both. Outside `interval` of t the conditional velocity is used
    alone (Kynkaanniemi et al. 2024); `rescale` in [0, 1] pulls the result towards the standard deviation of the
    conditional one (Lin et al. 2023, equation 15 and 16). An unconditional half made from another prompt is a negative
    prompt.
    """

    def guided(x: Float[Array, "b ..."], t: Float[Array, ""], memory: PyTree) -> tuple[Float[Array, "b ..."], PyTree]:
        both, memory = v(jnp.concatenate([x, x]), t, memory)
        conditional, other = jnp.split(both, 2)
        inside = (interval[0] <= t) & (t <= interval[1])
        out = other + jnp.where(inside, scale, 1.0) * (conditional - other)
        if rescale:
            dims = tuple(range(1, x.ndim))
            ratio = jnp.std(conditional, dims, keepdims=True) / (jnp.std(out, dims, keepdims=True) + 1e-6)
            out = out * jnp.where(inside, rescale * ratio + (1.0 - rescale), 1.0)
        return out, memory

    return guided
