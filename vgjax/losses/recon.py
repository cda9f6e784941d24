"""L1 reconstruction error."""

import jax.numpy as jnp
from einops import reduce

from vgjax.typing import Array, Float


def term(
    video: Float[Array, "b t h w c"],
    recon: Float[Array, "b t h w c"],
    mean: Float[Array, "b s i j z"],
    logvar: Float[Array, "b s i j z"],
) -> Float[Array, " b"]:
    """Mean absolute error of each clip, fp32."""
    return reduce(jnp.abs(recon.astype(jnp.float32) - video.astype(jnp.float32)), "b ... -> b", "mean")
