"""Into attention heads and out again: fused projections whose head dim is a dim of the kernel, so that it shards."""

import jax.numpy as jnp
from flax import linen as nn

from vgjax.nn.norm import RMSNorm
from vgjax.sharding import named
from vgjax.typing import Array, Dtype, Float


class QKV(nn.Module):
    """Query, key and value of every token in one matmul; RMS norm of q and k per head (Henry et al. 2020) if `norm`."""

    heads: int
    norm: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"]
    ) -> tuple[Float[Array, "b n h k"], Float[Array, "b n h k"], Float[Array, "b n h k"]]:
        shape = (3, self.heads, x.shape[-1] // self.heads)
        names = (None, "heads", "head_dim")
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2, 3))
        kernel = self.param("kernel", named(init, "embed", *names), (x.shape[-1], *shape), jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, *names), shape, jnp.float32)
        y = jnp.einsum("bnd,dshk->bnshk", x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)
        q, k, v = y[:, :, 0], y[:, :, 1], y[:, :, 2]
        if self.norm:
            q, k = RMSNorm(dtype=self.dtype, name="norm_q")(q), RMSNorm(dtype=self.dtype, name="norm_k")(k)
        return q, k, v


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
        y = jnp.einsum("bnhk,hkd->bnd", o.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            bias = self.param("bias", named(nn.initializers.zeros, "embed"), (self.features,), jnp.float32)
            y = y + bias.astype(self.dtype)
        return y
