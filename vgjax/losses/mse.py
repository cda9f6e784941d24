"""Mean squared reconstruction error.

On flat synthetic clips it learns where L1 does not: the gradient of L1 keeps its size as the error of a plain
background shrinks, and drowns that of the few pixels at the rims.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from einops import reduce

from vgjax.losses.term import Plain, View
from vgjax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class MSE(Plain):
    """Mean squared error of each clip, fp32."""

    def __call__(self, view: View) -> tuple[Float[Array, " b"], Mapping[str, Float[Array, " b"]]]:
        error = jnp.square(view.recon.astype(jnp.float32) - view.video.astype(jnp.float32))
        return reduce(error, "b ... -> b", "mean"), {}


term = MSE()
