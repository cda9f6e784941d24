"""AdaLN-zero (Peebles & Xie 2022): a conditioning vector shifts, scales and gates; all zero at the start, in fp32.

A row of tokens holds `s` samples, one behind the other where they are packed, with a conditioning vector each.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vgjax.nn.linear import Linear
from vgjax.typing import Array, Dtype, Float, Int


class Modulation(nn.Module):
    """`count` vectors of width `dim` for every token, from the conditioning vectors (already through their SiLU).

    samples: which of its row's vectors a token takes, from 1 on; 0 takes none. Each result is `b n d`, or `b 1 d` where
    a row has one sample.
    """

    dim: int
    count: int

    @nn.compact
    def __call__(self, vec: Float[Array, "b s e"], samples: Int[Array, "b n"]) -> list[Float[Array, "b _ d"]]:
        vectors = Linear(self.count * self.dim, ("embed", "mlp"), kernel_init=nn.initializers.zeros, name="linear")(vec)
        return jnp.split(per_token(vectors, samples), self.count, axis=-1)


def per_token(vectors: Float[Array, "b s d"], samples: Int[Array, "b n"]) -> Float[Array, "b _ d"]:
    """The vector that each token of a row takes (from 1 on; 0: none); the one vector itself where a row has one."""
    if vectors.shape[1] == 1:
        return vectors
    one_hot = jax.nn.one_hot(samples - 1, vectors.shape[1])
    return jnp.einsum("bns,bsd->bnd", one_hot, vectors, precision="highest")


def modulate(
    x: Float[Array, "b n d"], shift: Float[Array, "b _ d"], scale: Float[Array, "b _ d"], dtype: Dtype
) -> Float[Array, "b n d"]:
    """Normalised fp32 tokens scaled by `1 + scale`, shifted, and only then rounded to the compute type."""
    return (x * (1 + scale) + shift).astype(dtype)


def gated(x: Float[Array, "b n d"], y: Float[Array, "b n d"], gate: Float[Array, "b _ d"]) -> Float[Array, "b n d"]:
    """The residual `x + gate * y`, added in fp32 and returned in the type of `x`."""
    return (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(x.dtype)
