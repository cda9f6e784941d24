"""A dense layer whose parameters carry logical names."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from vgjax.nn.contract import LINEAR, contract
from vgjax.parallel.sharding import named
from vgjax.typing import Array, Dtype, Float

# LeCun-normal keeps the variance of a unit input; the init of every unnamed matrix in the house.
lecun = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


class Linear(nn.Module):
    """`x @ kernel + bias` over the last dim; fp32 parameters, computed in `dtype`."""

    features: int
    names: tuple[str | None, str | None] = ("embed", "mlp")
    use_bias: bool = True
    kernel_init: Callable[..., Array] = lecun
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... d"]:
        kernel = self.param("kernel", named(self.kernel_init, *self.names), (x.shape[-1], self.features), jnp.float32)
        (y,) = contract(self, LINEAR, x, kernel, self.dtype)
        if self.use_bias:
            bias = self.param("bias", named(nn.initializers.zeros, self.names[1]), (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)
        return y
