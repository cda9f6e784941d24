"""Llama 3 (2407.21783) as a text encoder: the hidden state of every token after some of its blocks.

Pre-norm blocks of causal attention with rotary positions, whose keys and values serve several heads each, and SwiGLU.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vgjax.attention.biased import biased, causal
from vgjax.errors import UserError
from vgjax.nn import rope
from vgjax.nn.heads import Heads, Merge
from vgjax.nn.mlp import GatedMLP
from vgjax.nn.norm import RMSNorm
from vgjax.nn.stack import Stack
from vgjax.parallel.sharding import named, shard
from vgjax.typing import Array, Bool, Dtype, Float, Int, Json, Sizes

_8B: Json = dict(vocab=128256, dim=4096, heads=32, kv_heads=8, inner=14336, blocks=32)
SIZES: Sizes = {
    "llama-3-8b": _8B,
    # What HunyuanVideo conditions on: LLaVA's Llama, with 64 more rows for LLaVA's own tokens.
    "hunyuan-video": dict(_8B, vocab=128320),
}


class Llama(nn.Module):
    """`Llama(**SIZES["llama-3-8b"])(ids, mask)`: tokens in `dtype`, after `blocks` blocks.

    kv_heads: heads of keys and values. inner: hidden units of the MLP. theta: period of the slowest rotation / 2 pi.
    norm: the final norm, that of the state after the last block. remat, scan: see `nn.stack`.
    Padding stands on the right: positions count from the first token.
    """

    vocab: int
    dim: int
    heads: int
    kv_heads: int
    inner: int
    blocks: int
    theta: float = 5e5
    eps: float = 1e-5
    norm: bool = True
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b m"], mask: Bool[Array, "b m"]) -> Float[Array, "b m d"]:
        """ids, mask: token ids, and which of them are real."""
        if self.dim % self.heads or self.heads % self.kv_heads:
            raise UserError(
                f"dim {self.dim} of Llama must divide into heads {self.heads}, and these into kv_heads {self.kv_heads}"
            )
        size = self.dim // self.heads
        table = self.param(
            "embedding", named(nn.initializers.normal(0.02), "vocab", "embed"), (self.vocab, self.dim), jnp.float32
        )
        x = shard(table[ids].astype(self.dtype), "batch", "text", None)
        turn = rope.rotation(jnp.arange(ids.shape[1])[None, :, None], (size,), self.theta)
        block = partial(LlamaBlock, self.heads, self.kv_heads, self.inner, self.eps, self.dtype)
        x = Stack(block, self.blocks, self.remat, self.scan, name="blocks")(x, turn, causal(mask))
        return RMSNorm(self.eps, dtype=self.dtype, name="norm")(x) if self.norm else x


class LlamaBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    heads: int
    kv_heads: int
    inner: int
    eps: float
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b m d"], turn: rope.Rotation, mask: Bool[Array, "b m m"]
    ) -> Float[Array, "b m d"]:
        dim = x.shape[-1]
        heads = partial(Heads, size=dim // self.heads, use_bias=False, dtype=self.dtype)
        y = RMSNorm(self.eps, dtype=self.dtype, name="norm")(x)
        (q,) = heads(1, self.heads, name="q")(y)
        k, v = heads(2, self.kv_heads, name="kv")(y)
        o = biased(rope.rotate(q, turn), rope.rotate(k, turn), v, mask)
        x = x + Merge(dim, use_bias=False, dtype=self.dtype, name="merge")(o)
        y = RMSNorm(self.eps, dtype=self.dtype, name="norm_mlp")(x)
        x = x + GatedMLP(self.inner, jax.nn.silu, self.dtype, name="mlp")(y)
        return shard(x, "batch", "text", None)
