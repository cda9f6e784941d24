"""Into attention heads and out again: projections whose heads are a dim of the kernel, so that they shard."""

import jax.numpy as jnp
from flax import linen as nn

from vgjax.nn.norm import RMSNorm
from vgjax.sharding import named
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
        dim, head = x.shape[-1], (self.heads, x.shape[-1] // self.heads)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=(2, 3), batch_axis=0)
        kernel = self.param("kernel", named(init, None, "embed", "heads", "head_dim"), (3, dim, *head), jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, None, "heads", "head_dim"), (3, *head), jnp.float32)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        # Not one matmul over "shk": XLA's CPU backend runs its backward a fifth slower (d 192, 3072 tokens), and a
        # flat "(s h k)" cannot be sharded over heads.
        q, k, v = (jnp.einsum("bnd,dhk->bnhk", x, w) + b for w, b in zip(kernel, bias, strict=True))
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
