"""Mean squared reconstruction error.

On flat synthetic clips it learns where L1 does not: the gradient of L1 keeps its size as the error of a plain
background shrinks, and drowns that of the few pixels at the rims.
"""

import jax.numpy as jnp
from einops import reduce

from vgjax.typing import Array, Float


def term(
    video: Float[Array, "b t h w c"],
    recon: Float[Array, "b t h w c"],
    mean: Float[Array, "b s i j z"],
    logvar: Float[Array, "b s i j z"],
) -> Float[Array, " b"]:
    """Mean squared error of each clip, fp32."""
    return reduce(jnp.square(recon.astype(jnp.float32) - video.astype(jnp.float32)), "b ... -> b", "mean")
