"""Laws of the timestep: how t is drawn in training, and the one `Shift` that training and sampling share.

t=0 is noise, t=1 is data. Uniform; LogitNormal and Mode (Esser et al. 2024, section 3.1, mirrored since they count from
data to noise); Shift is their equation 23 with u = 1 - t.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from vgjax.errors import UserError
from vgjax.typing import Array, Float, Key


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Every t equally often."""

    def sample(self, keys: Key) -> Float[Array, " b"]:
        return jax.vmap(jax.random.uniform)(keys)

    def density(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        return jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """`logit(t) ~ N(loc, scale)`: middle times more often; a negative `loc` leans to noise."""

    loc: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise UserError(f"time.scale={self.scale} must be positive")

    def sample(self, keys: Key) -> Float[Array, " b"]:
        return jax.nn.sigmoid(self.loc + self.scale * jax.vmap(jax.random.normal)(keys))

    def density(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        z = (jnp.log(t) - jnp.log1p(-t) - self.loc) / self.scale
        return jnp.exp(-0.5 * z**2) / (self.scale * math.sqrt(2 * math.pi) * t * (1 - t))


@dataclasses.dataclass(frozen=True)
class Mode:
    """`u -> 1 - u - s (cos^2(pi/2 u) - 1 + u)` (Esser et al. 2024, equation 20), heavy in the middle for s > 0."""

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1.0 <= self.scale <= 2.0 / (math.pi - 2.0):
            raise UserError(f"time.scale={self.scale} must lie in [-1, {2 / (math.pi - 2):.3f}], to be monotone")

    def _t(self, u: Float[Array, "..."]) -> Float[Array, "..."]:
        # Their f counts towards noise, ours towards data: t = 1 - f(u).
        return u + self.scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)

    def sample(self, keys: Key) -> Float[Array, " b"]:
        return jnp.clip(self._t(jax.vmap(jax.random.uniform)(keys)), 0.0, 1.0)

    def density(self, t: Float[Array, " n"]) -> Float[Array, " n"]:
        u = jnp.linspace(0.0, 1.0, 4097)
        slope = 1 + self.scale * (1 - jnp.pi / 2 * jnp.sin(jnp.pi * u))
        return 1.0 / jnp.interp(t, self._t(u), slope)


TIMES = {"uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode}


@dataclasses.dataclass(frozen=True)
class Shift:
    """Moves time towards noise by a factor: `t -> t / (s - (s - 1) t)`; s > 1 spends more of it near t=0.

    With `per_tokens > 0` the factor grows like the square root of the token count: `s = factor * sqrt(n / per_tokens)`,
    since a larger video needs more noise to be destroyed (Esser et al. 2024, section 5.3.2).
    """

    factor: float = 1.0
    per_tokens: int = 0

    def __post_init__(self) -> None:
        if self.factor <= 0 or self.per_tokens < 0:
            raise UserError(f"shift: factor={self.factor} must be positive, per_tokens={self.per_tokens} not negative")

    def at(self, tokens: int) -> float:
        """The factor for a video of `tokens` tokens."""
        return self.factor * math.sqrt(tokens / self.per_tokens) if self.per_tokens else self.factor

    def __call__(self, t: Float[Array, "..."], tokens: int) -> Float[Array, "..."]:
        s = self.at(tokens)
        return t / (s - (s - 1.0) * t)

    def density(self, law: Uniform | LogitNormal | Mode, t: Float[Array, " n"], tokens: int = 1) -> Float[Array, " n"]:
        """Density of the shifted law: its inverse is the shift by 1/s."""
        s = self.at(tokens)
        unshifted = s * t / (1.0 + (s - 1.0) * t)
        return law.density(unshifted) * s / (1.0 + (s - 1.0) * t) ** 2
