"""Scalars (time, guidance) as vectors: sinusoids and a small MLP (Ho et al. 2020, Peebles & Xie 2022)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vgjax.nn.mlp import MLP
from vgjax.typing import Array, Float

FREQUENCIES = 256  # sinusoids a scalar is turned into: the number of every open model of the family
SCALE = 1000.0  # the period of the slowest sinusoids assumes steps 0..1000, our scalars are of order one

# Of the 128 exponentials of period 1e4 two lie within 0.03 ulp below a tie, and torch's exp rounds them up: by the part
# of the logarithm of the period. Told a guidance of 6, HunyuanVideo is 30 times nearer to its reference with them.
ROUNDED_UP = (12 / 128, 106 / 128)


def sinusoidal(x: Float[Array, "*b"], dim: int = FREQUENCIES, period: float = 1e4) -> Float[Array, "*b {dim}"]:
    """`dim/2` cosines then `dim/2` sines of `x`, angular frequencies from 1 down to almost 1/period."""
    # Rounded as published models have them: at thousands of radians an ulp of a frequency is seen.
    exponents = np.float32(-math.log(period)) * np.arange(dim // 2, dtype=np.float32) / np.float32(dim // 2)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    up = np.isin(np.arange(dim // 2) / (dim // 2), ROUNDED_UP)
    frequencies[up] = np.nextafter(frequencies[up], np.float32(np.inf))
    angles = x.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ScalarEmbed(nn.Module):
    """A scalar of order one (time in [0, 1], a guidance scale) as a vector of width `dim`, in fp32."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "*b"]) -> Float[Array, "*b d"]:
        return MLP(self.dim, self.dim, act=jax.nn.silu, name="mlp")(sinusoidal(SCALE * x))
