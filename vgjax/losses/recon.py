"""L1 reconstruction error."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from einops import reduce

from vgjax.losses.term import Plain, View
from vgjax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class L1(Plain):
    """Mean absolute error of each clip, fp32."""

    def __call__(self, view: View) -> tuple[Float[Array, " b"], Mapping[str, Float[Array, " b"]]]:
        error = jnp.abs(view.recon.astype(jnp.float32) - view.video.astype(jnp.float32))
        return reduce(error, "b ... -> b", "mean"), {}


term = L1()
