"""Normalisation over the last dim only, so that it is causal, streams exactly and never mixes positions."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vgjax.sharding import named
from vgjax.typing import Array, Dtype, Float


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019), computed in fp32, returned in `dtype`."""

    eps: float = 1e-6
    scale: bool = True
    name_of_dim: str | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.scale:
            y = y * self.param("scale", named(nn.initializers.ones, self.name_of_dim), (x.shape[-1],), jnp.float32)
        return y.astype(self.dtype)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016), computed in fp32, returned in `dtype`; plain unless `affine`."""

    eps: float = 1e-6
    affine: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.affine:
            y = y * self.param("scale", named(nn.initializers.ones, None), (x.shape[-1],), jnp.float32)
            y = y + self.param("bias", named(nn.initializers.zeros, None), (x.shape[-1],), jnp.float32)
        return y.astype(self.dtype)
