"""T5's encoder (1910.10683, as v1.1 with gated GELU: 2002.05202); umT5 (2304.09151) and ByT5 (2105.13626) too.

Pre-norm blocks without biases; attention is unscaled and knows order by a learned bias of the distance alone, in
logarithmic buckets, which all blocks share (T5, ByT5) or each has its own (umT5).
"""

from functools import partial

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from vgjax.attention.biased import biased
from vgjax.nn.heads import Heads, Merge
from vgjax.nn.mlp import GatedMLP
from vgjax.nn.norm import RMSNorm
from vgjax.nn.stack import Stack
from vgjax.parallel.sharding import named, shard
from vgjax.typing import Array, Bool, Dtype, Float, Int, Sizes

SIZES: Sizes = {
    "t5-xxl": dict(vocab=32128, dim=4096, heads=64, inner=10240, blocks=24),
    "umt5-xxl": dict(vocab=256384, dim=4096, heads=64, inner=10240, blocks=24, shared_bias=False),
    "byt5-small": dict(vocab=384, dim=1472, heads=6, inner=3584, blocks=12),
    "byt5-base": dict(vocab=384, dim=1536, heads=12, inner=3968, blocks=18),
}
BUCKETS = 32  # of distances: half look back, half ahead; of each, half hold one distance alone
REACH = 128  # from this distance on all fall into the last bucket


class T5Encoder(nn.Module):
    """`T5Encoder(**SIZES["t5-xxl"])(ids, mask)`: tokens in `dtype`; what stands at padding is not to be used.

    head_dim: channels of a head; heads x head_dim may differ from dim. inner: hidden units of the MLP.
    shared_bias: one table of distances for all blocks, not one each. remat, scan: see `nn.stack`.
    """

    vocab: int
    dim: int
    heads: int
    inner: int
    blocks: int
    head_dim: int = 64
    shared_bias: bool = True
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b m"], mask: Bool[Array, "b m"]) -> Float[Array, "b m d"]:
        """ids, mask: token ids, and which of them are real."""
        table = self.param(
            "embedding", named(nn.initializers.normal(1.0), "vocab", "embed"), (self.vocab, self.dim), jnp.float32
        )
        x = shard(table[ids].astype(self.dtype), "batch", "text", None)
        bias = DistanceBias(self.heads, name="bias")(ids.shape[1]) if self.shared_bias else None
        block = partial(T5Block, self.heads, self.head_dim, self.inner, self.dtype)
        x = Stack(block, self.blocks, self.remat, self.scan, name="blocks")(x, mask, bias)
        return RMSNorm(dtype=self.dtype, name="norm")(x)


class T5Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`; with a bias of its own where none is given."""

    heads: int
    head_dim: int
    inner: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b m d"], mask: Bool[Array, "b m"], bias: Float[Array, "h m m"] | None
    ) -> Float[Array, "b m d"]:
        if bias is None:
            bias = DistanceBias(self.heads, name="bias")(x.shape[1])
        y = RMSNorm(dtype=self.dtype, name="norm")(x)
        q, k, v = Heads(3, self.heads, self.head_dim, use_bias=False, dtype=self.dtype, name="qkv")(y)
        o = biased(q, k, v, mask[:, None, :], bias, scale=1.0)
        x = x + Merge(x.shape[-1], use_bias=False, dtype=self.dtype, name="merge")(o)
        y = RMSNorm(dtype=self.dtype, name="norm_mlp")(x)
        return shard(x + GatedMLP(self.inner, dtype=self.dtype, name="mlp")(y), "batch", "text", None)


class DistanceBias(nn.Module):
    """What each head adds to its scores for the distance from query to key, fp32."""

    heads: int

    @nn.compact
    def __call__(self, length: int) -> Float[Array, "h m m"]:
        init = named(nn.initializers.normal(1.0), None, "heads")
        of_distance = self.param("table", init, (BUCKETS, self.heads), jnp.float32)[buckets(length)]
        distance = jnp.arange(length)[None, :] - jnp.arange(length)[:, None]
        return rearrange(of_distance[distance + length - 1], "n m h -> h n m")


def buckets(length: int) -> np.ndarray:
    """The bucket of every distance from `1 - length` (a key far behind the query) to `length - 1`."""
    distance = np.arange(1 - length, length)
    half, exact = BUCKETS // 2, BUCKETS // 4
    wide = exact * (REACH / exact) ** (np.arange(half - exact) / (half - exact))
    edges = np.concatenate([np.arange(1, exact), wide])
    return np.where(distance > 0, half, 0) + np.digitize(np.abs(distance), edges)
