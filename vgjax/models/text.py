"""How a model trained here reads text: by an encoder of its own, or what frozen encoders made of it.

The encoder takes hashed words or bytes and gives tokens and a pooled vector: a pre-norm transformer with rotary
positions. A token's embedding is the sum of one row a hash (Bloom embeddings, Serrà & Karatzoglou 2017), so two words
that share one bucket still differ by the other.
"""

from functools import partial

import jax.numpy as jnp
from flax import linen as nn

from vgjax.attention.full import Full
from vgjax.attention.segments import among
from vgjax.errors import UserError
from vgjax.nn import rope
from vgjax.nn.heads import QKV, Merge
from vgjax.nn.linear import Linear
from vgjax.nn.mlp import MLP
from vgjax.nn.norm import RMSNorm
from vgjax.nn.stack import Stack
from vgjax.parallel.sharding import named, shard
from vgjax.typing import Array, Attention, Bool, Context, Dtype, Float, Int, Tokens

THETA = 100.0  # captions are short: the slowest frequency turns once in about six hundred tokens


class TextEncoder(nn.Module):
    """`(ids, mask) -> (tokens of width dim, pooled vector)`; padded positions come out as 0.

    vocab: rows of the embedding table, hashes: ids a token, pooled: width of the pooled vector.
    """

    vocab: int
    hashes: int
    dim: int
    blocks: int
    heads: int
    pooled: int
    mlp_ratio: float = 4.0
    remat: str = "none"
    scan: bool = True
    attention: Attention = Full()
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b m r"], mask: Bool[Array, "b m"]
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b p"]]:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise UserError(f"dim {self.dim} of the text encoder must divide into heads {self.heads} of even size")
        if ids.shape[-1] != self.hashes:
            raise UserError(f"the text encoder expects {self.hashes} ids a token, the tokenizer gives {ids.shape[-1]}")
        table = named(nn.initializers.normal(self.hashes**-0.5), "vocab", "embed")
        table = self.param("embedding", table, (self.vocab, self.dim), jnp.float32)
        x = shard(jnp.sum(table[ids], axis=2).astype(self.dtype), "batch", "text", None)
        turn = rope.rotation(jnp.arange(ids.shape[1])[None, :, None], (self.dim // self.heads,), THETA)
        block = partial(TextBlock, self.heads, int(self.mlp_ratio * self.dim), self.attention, self.dtype)
        x = Stack(block, self.blocks, self.remat, self.scan, name="blocks")(x, turn, mask.astype(jnp.int32))
        x = RMSNorm(dtype=self.dtype, name="norm")(x) * mask[:, :, None]
        mean = jnp.sum(x.astype(jnp.float32), axis=1) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        return x, Linear(self.pooled, ("embed", None), name="pool")(mean)

    def read(self, context: Context) -> tuple[Tokens, Float[Array, "b p"]]:
        """(tokens, pooled vector) of the ids in a Context."""
        ((ids, mask),) = context.text.values()
        c, vec = self(ids, mask)
        return Tokens(c, mask), vec


class TextStreams(nn.Module):
    """What frozen encoders made of a text, `(tokens of width dim, pooled vector)` for a model trained from scratch.

    Each stream is normalised (encoders differ in scale by orders of magnitude) and projected on its own; the streams
    stand one behind the other, as Stable Diffusion 3 joins its encoders (2403.03206, section 5.2). The pooled vector is
    projected from those that encoders give and from the mean of each stream. Padded positions come out as 0.
    """

    dim: int
    pooled: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def read(self, context: Context) -> tuple[Tokens, Float[Array, "b p"]]:
        """(tokens, pooled vector) of the embeddings in a Context."""
        tokens, masks, vectors = [], [], [] if context.vec is None else [context.vec.astype(jnp.float32)]
        for name, (c, mask) in sorted(context.text.items()):
            c = RMSNorm(dtype=self.dtype, name=f"norm_{name}")(c.astype(jnp.float32)) * mask[:, :, None]
            real = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
            vectors.append(jnp.sum(c.astype(jnp.float32), axis=1) / real)
            c = Linear(self.dim, (None, "embed"), dtype=self.dtype, name=f"stream_{name}")(c) * mask[:, :, None]
            tokens.append(shard(c, "batch", "text", None))
            masks.append(mask)
        vec = Linear(self.pooled, (None, None), name="pool")(jnp.concatenate(vectors, axis=-1))
        return Tokens(jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)), vec


class TextBlock(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    heads: int
    inner: int
    attention: Attention
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b m d"], turn: rope.Rotation, samples: Int[Array, "b m"]
    ) -> Float[Array, "b m d"]:
        q, k, v = QKV(self.heads, dtype=self.dtype, name="qkv")(RMSNorm(dtype=self.dtype, name="norm")(x))
        o = self.attention(rope.rotate(q, turn), rope.rotate(k, turn), v, among(samples))
        x = x + Merge(x.shape[-1], dtype=self.dtype, name="merge")(o)
        x = x + MLP(self.inner, dtype=self.dtype, name="mlp")(RMSNorm(dtype=self.dtype, name="norm_mlp")(x))
        return shard(x, "batch", "text", None)
