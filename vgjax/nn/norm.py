"""Normalisation over the last dim only, so that it is causal, streams exactly and never mixes positions.

`GroupNorm` is the exception: it mixes all positions of a sample, and the future is among them.
"""

import jax
import jax.numpy as jnp
from einops import reduce, repeat
from flax import linen as nn

from vgjax.parallel.sharding import named
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


class GroupNorm(nn.Module):
    """Group norm (Wu & He 2018) over all positions and the channels of a group, in fp32, returned in `dtype`."""

    groups: int = 32
    eps: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        y = x.astype(jnp.float32)
        y = y - self._mean(y)
        y = y * jax.lax.rsqrt(self._mean(jnp.square(y)) + self.eps)
        y = y * self.param("scale", named(nn.initializers.ones, None), (x.shape[-1],), jnp.float32)
        y = y + self.param("bias", named(nn.initializers.zeros, None), (x.shape[-1],), jnp.float32)
        return y.astype(self.dtype)

    def _mean(self, y: Float[Array, "b ... c"]) -> Float[Array, "b ... c"]:
        """Of each group, at each of its channels."""
        # Positions first: with a dim for a group's few channels a TPU would pad the whole video to 128 of them.
        mean = jnp.mean(y, axis=tuple(range(1, y.ndim - 1)), keepdims=True)
        mean = reduce(mean, "... (g c) -> ... g", "mean", g=self.groups)
        return repeat(mean, "... g -> ... (g c)", c=y.shape[-1] // self.groups)
