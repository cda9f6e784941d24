"""KL divergence of the diagonal Gaussian posterior from the standard normal (Kingma & Welling 2013)."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from einops import reduce

from vgjax.losses.term import Plain, View
from vgjax.typing import Array, Float


@dataclasses.dataclass(frozen=True)
class KL(Plain):
    """Nats per latent element: a mean, so that its weight holds at any size."""

    def __call__(self, view: View) -> tuple[Float[Array, " b"], Mapping[str, Float[Array, " b"]]]:
        mean, logvar = view.mean.astype(jnp.float32), view.logvar.astype(jnp.float32)
        return reduce(0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar), "b ... -> b", "mean"), {}


term = KL()
