"""Into attention heads and out again: projections whose heads are a dim of the kernel, so that they shard."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from vgjax.nn.contract import HEADS, MERGE, contract
from vgjax.nn.norm import RMSNorm
from vgjax.parallel.sharding import named
from vgjax.typing import Array, Dtype, Float


class QKV(nn.Module):
    """Query, key and value of every token from one kernel; per-head RMS norm of q and k (Henry 2020) if `norm`."""

    heads: int
    norm: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n h k"], Float[Array, "b n h k"], Float[Array, "b n h k"]]:
        q, k, v = project(self, x, 3, self.heads, self.dtype)
        if self.norm:
            q, k = RMSNorm(dtype=self.dtype, name="norm_q")(q), RMSNorm(dtype=self.dtype, name="norm_k")(k)
        return q, k, v


class Heads(nn.Module):
    """`count` projections of every token into heads from one kernel; heads of `size`, or that share the width."""

    count: int
    heads: int
    size: int | None = None
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"]) -> list[Float[Array, "b n h k"]]:
        return project(self, x, self.count, self.heads, self.dtype, self.size, self.use_bias)


def project(
    module: nn.Module,
    x: Float[Array, "b n d"],
    count: int,
    heads: int,
    dtype: Dtype,
    size: int | None = None,
    use_bias: bool = True,
) -> list[Float[Array, "b n h k"]]:
    """`count` projections into heads by a kernel, and a bias, of `module`."""
    dim, head = x.shape[-1], (heads, size or x.shape[-1] // heads)
    init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=(2, 3), batch_axis=0)
    kernel = module.param("kernel", named(init, None, "embed", "heads", "head_dim"), (count, dim, *head), jnp.float32)
    out = contract(module, HEADS, x, kernel, dtype)
    if not use_bias:
        return out
    bias = module.param("bias", named(nn.initializers.zeros, None, "heads", "head_dim"), (count, *head), jnp.float32)
    return [y + b for y, b in zip(out, bias.astype(dtype), strict=True)]


class HeadsNorm(nn.Module):
    """RMS norm over all heads of a token at once, in fp32, returned in `dtype`."""

    eps: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b n h k"]) -> Float[Array, "b n h k"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=(-2, -1), keepdims=True) + self.eps)
        scale = self.param("scale", named(nn.initializers.ones, "heads", "head_dim"), x.shape[-2:], jnp.float32)
        return (y * scale).astype(self.dtype)


class Merge(nn.Module):
    """All heads of a token back to width `features`."""

    features: int
    use_bias: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, o: Float[Array, "b n h k"]) -> Float[Array, "b n d"]:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2)
        shape = (*o.shape[-2:], self.features)
        kernel = self.param("kernel", named(init, "heads", "head_dim", "embed"), shape, jnp.float32)
        (y,) = contract(self, MERGE, o, kernel, self.dtype)
        if self.use_bias:
            bias = self.param("bias", named(nn.initializers.zeros, "embed"), (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)
        return y
