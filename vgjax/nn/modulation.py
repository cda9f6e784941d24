"""AdaLN-zero (Peebles & Xie 2022): a conditioning vector shifts, scales and gates; all zero at the start, in fp32."""

import jax.numpy as jnp
from flax import linen as nn

from vgjax.nn.linear import Linear
from vgjax.typing import Array, Dtype, Float


class Modulation(nn.Module):
    """`count` vectors of width `dim` from the conditioning vector (already through its SiLU), each `b 1 d`."""

    dim: int
    count: int

    @nn.compact
    def __call__(self, vec: Float[Array, "b e"]) -> list[Float[Array, "b 1 d"]]:
        vectors = Linear(self.count * self.dim, ("embed", "mlp"), kernel_init=nn.initializers.zeros, name="linear")(vec)
        return jnp.split(vectors[:, None], self.count, axis=-1)


def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"], dtype: Dtype
) -> Float[Array, "b n d"]:
    """Normalised fp32 tokens scaled by `1 + scale`, shifted, and only then rounded to the compute type."""
    return (x * (1 + scale) + shift).astype(dtype)


def gated(x: Float[Array, "b n d"], y: Float[Array, "b n d"], gate: Float[Array, "b 1 d"]) -> Float[Array, "b n d"]:
    """The residual `x + gate * y`, added in fp32 and returned in the type of `x`."""
    return (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(x.dtype)
