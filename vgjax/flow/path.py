"""The straight path of rectified flow (Liu et al. 2022; Lipman et al. 2022): noise at t=0, data at t=1."""

import dataclasses

import jax
import jax.numpy as jnp

from vgjax.typing import Array, Float, Key, UInt


@dataclasses.dataclass(frozen=True)
class Straight:
    """`x_t = (1-t) noise + t data`, velocity `data - noise`."""

    def mix(
        self, noise: Float[Array, "b ..."], data: Float[Array, "b ..."], t: Float[Array, "b"]
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """(x_t, velocity), fp32."""
        t = jnp.expand_dims(t, tuple(range(1, data.ndim)))
        return (1.0 - t) * noise + t * data, data - noise


def sample_keys(key: Key, index: UInt[Array, "b"]) -> Key:
    """One key a sample, from the global sample index alone: the same on any number of devices or micro-batches."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
