"""KL divergence of the diagonal Gaussian posterior from the standard normal (Kingma & Welling 2013)."""

import jax.numpy as jnp
from einops import reduce

from vgjax.typing import Array, Float


def term(
    video: Float[Array, "b t h w c"],
    recon: Float[Array, "b t h w c"],
    mean: Float[Array, "b s i j z"],
    logvar: Float[Array, "b s i j z"],
) -> Float[Array, " b"]:
    """Nats per latent element of each clip, fp32: a mean, so that its weight holds at any size."""
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    return reduce(0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar), "b ... -> b", "mean")
