"""Classifier-free guidance as a map from Velocity to Velocity (Ho & Salimans 2022)."""

import jax.numpy as jnp

from vgjax.flow.steppers import Velocity
from vgjax.typing import Array, Float


def cfg(v: Velocity, scale: float, interval: tuple[float, float] = (0.0, 1.0), rescale: float = 0.0) -> Velocity:
    """Guides `v`, a velocity of a doubled batch (conditional half first), by `u + scale (c - u)`.

    Both halves run in one forward. Outside `interval` of t the conditional velocity is used alone (Kynkaanniemi et al.
    2024); `rescale` in [0, 1] pulls the result towards the standard deviation of the conditional one (Lin et al. 2023,
    equation 15 and 16). An unconditional half made from another prompt is a negative prompt.
    """

    def guided(x: Float[Array, "b ..."], t: Float[Array, ""]) -> Float[Array, "b ..."]:
        conditional, other = jnp.split(v(jnp.concatenate([x, x]), t), 2)
        inside = (interval[0] <= t) & (t <= interval[1])
        out = other + jnp.where(inside, scale, 1.0) * (conditional - other)
        if rescale:
            dims = tuple(range(1, x.ndim))
            ratio = jnp.std(conditional, dims, keepdims=True) / (jnp.std(out, dims, keepdims=True) + 1e-6)
            out = out * jnp.where(inside, rescale * ratio + (1.0 - rescale), 1.0)
        return out

    return guided
