"""Two linear layers with a pointwise function between."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from vgjax.nn.linear import Linear
from vgjax.typing import Array, Dtype, Float


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU by its tanh approximation, the one of the open video transformers."""
    return jax.nn.gelu(x, approximate=True)


class MLP(nn.Module):
    """`inner` hidden units, `features` out (the width of the input when None)."""

    inner: int
    features: int | None = None
    act: Callable[[Array], Array] = gelu
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... d"]:
        hidden = self.act(Linear(self.inner, ("embed", "mlp"), dtype=self.dtype, name="up")(x))
        return Linear(self.features or x.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="down")(hidden)
