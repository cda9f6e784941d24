"""Two linear layers with a pointwise function between, gated or not."""

from collections.abc import Callable
from functools import partial

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


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))` without biases (Shazeer 2020, arXiv:2002.05202): GEGLU, SwiGLU."""

    inner: int
    act: Callable[[Array], Array] = gelu
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        into = partial(Linear, self.inner, ("embed", "mlp"), use_bias=False, dtype=self.dtype)
        hidden = self.act(into(name="gate")(x)) * into(name="up")(x)
        return Linear(x.shape[-1], ("mlp", "embed"), use_bias=False, dtype=self.dtype, name="down")(hidden)
