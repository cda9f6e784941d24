"""CrossDiT: the velocity of a latent video whose tokens attend to one another and then to the text; the Wan family.

Wan 2.1 and 2.2 (2503.20314): one time embedding, projected once for all blocks, each of which adds a bias of its own;
q and k are normalised over all heads. Times may differ between latent frames, as where the first frame is given. The
tokens of an image's encoder, where there are some, have keys and values of their own in every cross-attention.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from vgjax.attention.full import Full
from vgjax.attention.parallel import CROSS, fill
from vgjax.attention.segments import Segments, among
from vgjax.errors import UserError
from vgjax.nn import dit, patch, rope
from vgjax.nn.embed import ScalarEmbed
from vgjax.nn.heads import Heads, HeadsNorm, Merge
from vgjax.nn.linear import Linear
from vgjax.nn.mlp import MLP
from vgjax.nn.modulation import gated, modulate, per_token
from vgjax.nn.norm import LayerNorm
from vgjax.nn.stack import Stack
from vgjax.parallel.sharding import named, shard
from vgjax.typing import Array, Attention, Bool, Dtype, Float, Int, Json, Sizes

_14B: Json = dict(dim=5120, heads=40, inner=13824, blocks=40, channels=16, text_dim=4096, remat="full")
SIZES: Sizes = {
    "wan2.1-t2v-1.3b": dict(dim=1536, heads=12, inner=8960, blocks=30, channels=16, text_dim=4096, remat="full"),
    "wan2.1-t2v-14b": _14B,
    "wan2.1-i2v-14b": dict(_14B, conditions=20, image_dim=1280),
    "wan2.2-t2v-a14b": _14B,
    "wan2.2-i2v-a14b": dict(_14B, conditions=20),
    "wan2.2-ti2v-5b": dict(dim=3072, heads=24, inner=14336, blocks=30, channels=48, text_dim=4096, remat="full"),
}

Tokens = Float[Array, "b n d"]


class CrossDiT(nn.Module):
    """`CrossDiT(**SIZES["wan2.1-t2v-1.3b"])`: velocity of latents, fp32.

    inner: hidden units of the MLP. channels: of the latents; conditions: channels that stand behind them in the input
    and are not predicted. image_dim: width of an image's tokens, 0 for none. rope_dims, theta, remat, scan, dtype,
    stream: as in MMDiT; the stream is fp32, as in the authors' code.
    """

    dim: int
    heads: int
    inner: int
    blocks: int
    channels: int
    text_dim: int
    conditions: int = 0
    image_dim: int = 0
    patch: tuple[int, int, int] = (1, 2, 2)
    rope_dims: tuple[int, int, int] | None = None
    theta: float = 1e4
    remat: str = "none"
    scan: bool = True
    attention: Attention = Full()
    dtype: Dtype = jnp.float32
    stream: Dtype | None = jnp.float32

    guidance = False  # no model of the family is told a scale

    def __call__(
        self,
        x: Float[Array, "b t h w z"],
        t: Float[Array, "b ..."],
        c: Float[Array, "b m e"],
        mask: Bool[Array, "b m"],
        vec: Float[Array, "b p"] | None = None,
        guidance: Float[Array, " b"] | None = None,
        image: Float[Array, "b i f"] | None = None,
    ) -> Float[Array, "b t h w c"]:
        """x: noisy latents (and conditions); t: 0 noise to 1 data, of a sample or of each of its latent frames.

        c, mask: text tokens and which of them are seen; image: the tokens of an image. vec and guidance, which other
        models take, are not looked at.
        """
        grid = self._check(x, t, c, image)
        tokens, places = patch.patchify(x, self.patch), patch.positions(grid)[None]
        ones = jnp.ones(tokens.shape[:2], jnp.int32)
        if t.ndim == 1:
            t, of_t = t[:, None], ones
        else:
            t, of_t = t[:, :: self.patch[0]], repeat(places[..., 0] + 1, "1 n -> b n", b=len(x))
        seen = None if image is None else jnp.ones(image.shape[:2], jnp.int32)
        v = self.packed(tokens, places, ones, t, of_t, c, mask.astype(jnp.int32), image, seen)
        return patch.unpatchify(v, self.patch, grid)

    @nn.compact
    def packed(
        self,
        x: Float[Array, "b n a"],
        places: Int[Array, "#b n 3"],
        of_x: Int[Array, "b n"],
        t: Float[Array, "b s"],
        of_t: Int[Array, "b n"],
        c: Float[Array, "b m e"],
        of_c: Int[Array, "b m"],
        image: Float[Array, "b i f"] | None = None,
        of_image: Int[Array, "b i"] | None = None,
    ) -> Float[Array, "b n _"]:
        """Rows of samples of any sizes, one behind the other: the velocity of every patch.

        x: patches (`nn.patch`), places: where each lies in its own video; of_x, of_c, of_image: to which sample of the
        row a token belongs, of_t: which of the row's times it has; from 1 on, 0 for padding.
        """
        n = x.shape[1]
        x, places, of_x, of_t = map(fill, (x, places, of_x, of_t))
        time = ScalarEmbed(self.dim, name="time")(t)
        condition = Linear(6 * self.dim, ("embed", "mlp"), name="modulation")(jax.nn.silu(time))
        x = Linear(self.dim, (None, "embed"), dtype=self.dtype, name="patches")(x)
        x = shard(x.astype(self.stream or self.dtype), "batch", "tokens", None)
        c = MLP(self.dim, self.dim, dtype=self.dtype, name="text")(c)
        seen = [(c, Segments(of_x, of_c))]
        if self.image_dim:
            seen.append((ImageEmbed(self.dim, self.dtype, name="image")(image), Segments(of_x, of_image)))
        turn = rope.rotation(places, self._rope_dims(), self.theta)
        block = partial(Block, self.heads, self.inner, self.attention, self.dtype)
        x = Stack(block, self.blocks, self.remat, self.scan, name="blocks")(x, condition, turn, of_x, of_t, seen)

        table = Biases(2, self.dim, name="biases")(time)
        shift, scale = jnp.split(per_token(rearrange(table, "b s two d -> b s (two d)"), of_t), 2, axis=-1)
        return dit.last(x, shift, scale, math.prod(self.patch) * self.channels, self.dtype)[:, :n]

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Video tokens of a latent grid `t h w`; a `UserError` where the patch does not divide it."""
        return math.prod(patch.check(grid, self.patch))

    def _rope_dims(self) -> tuple[int, int, int]:
        """Like Wan: a third each for h and w, rounded down to pairs, the rest for t."""
        head = self.dim // self.heads
        return self.rope_dims or (head - 4 * (head // 6), 2 * (head // 6), 2 * (head // 6))

    def _check(self, x: Array, t: Array, c: Array, image: Array | None) -> tuple[int, int, int]:
        """The grid of patches; a `UserError` for sizes that do not fit each other."""
        wanted = {"channels + conditions": (self.channels + self.conditions, x), "text_dim": (self.text_dim, c)}
        if self.image_dim and image is not None:
            wanted["image_dim"] = (self.image_dim, image)
        dit.check(self.dim, self.heads, self._rope_dims, wanted)
        if bool(self.image_dim) != (image is not None):
            raise UserError(
                f"image_dim is {self.image_dim}: the call must {'' if self.image_dim else 'not '}give an image"
            )
        if t.ndim == 2 and t.shape[1] != x.shape[1]:
            raise UserError(
                f"t has {t.shape[1]} times for {x.shape[1]} latent frames: give one a sample or one a frame"
            )
        return patch.check(x.shape[1:4], self.patch)


class Block(nn.Module):
    """Self-attention, cross-attention, MLP."""

    heads: int
    inner: int
    attention: Attention
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Tokens,
        condition: Float[Array, "b s e"],
        turn: rope.Rotation,
        of_x: Int[Array, "b n"],
        of_t: Int[Array, "b n"],
        seen: list[tuple[Float[Array, "b _ d"], Segments]],
    ) -> Tokens:
        dim = x.shape[-1]
        vectors = Biases(6, dim, name="biases")(rearrange(condition, "b s (six d) -> b s six d", six=6))
        vectors = per_token(rearrange(vectors, "b s six d -> b s (six d)"), of_t)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.split(vectors, 6, axis=-1)

        y = modulate(LayerNorm(name="norm")(x), shift, scale, self.dtype)
        q, k, v = Heads(3, self.heads, dtype=self.dtype, name="qkv")(y)
        q, k = (HeadsNorm(dtype=self.dtype, name=f"norm_{name}")(a) for name, a in (("q", q), ("k", k)))
        q, k, v = (shard(a, "batch", "tokens", "heads", None) for a in (rope.rotate(q, turn), rope.rotate(k, turn), v))
        o = self.attention(q, k, v, among(of_x))
        x = gated(x, Merge(dim, dtype=self.dtype, name="merge")(o), gate)
        x = x + CrossAttention(self.heads, self.dtype, name="cross")(x, seen)
        mlp = MLP(self.inner, dtype=self.dtype, name="mlp")
        x = gated(x, mlp(modulate(LayerNorm(name="norm_mlp")(x), shift_mlp, scale_mlp, self.dtype)), gate_mlp)
        return shard(x, "batch", "tokens", None)


class CrossAttention(nn.Module):
    """Tokens ask; each kind of `seen` (text, image) answers with keys and values of its own, and the answers add up."""

    heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Tokens, seen: list[tuple[Float[Array, "b _ d"], Segments]]) -> Tokens:
        y = LayerNorm(affine=True, dtype=self.dtype, name="norm")(x)
        (q,) = Heads(1, self.heads, dtype=self.dtype, name="q")(y)
        q = HeadsNorm(dtype=self.dtype, name="norm_q")(q)
        total = 0.0
        for kind, (tokens, segments) in zip(("text", "image"), seen, strict=False):
            k, v = Heads(2, self.heads, dtype=self.dtype, name=f"{kind}_kv")(tokens)
            total = total + CROSS(q, HeadsNorm(dtype=self.dtype, name=f"{kind}_norm")(k), v, segments)
        return Merge(x.shape[-1], dtype=self.dtype, name="merge")(total)


class Biases(nn.Module):
    """`count` vectors of an own, added to those of the condition, or to the one that stands for all."""

    count: int
    dim: int

    @nn.compact
    def __call__(self, condition: Float[Array, "b s ... d"]) -> Float[Array, "b s _ d"]:
        init = named(nn.initializers.normal(self.dim**-0.5), None, "embed")
        table = self.param("table", init, (self.count, self.dim), jnp.float32)
        return table + (condition[:, :, None] if condition.ndim == 3 else condition)


class ImageEmbed(nn.Module):
    """The tokens of an image's encoder at the model's width."""

    dim: int
    dtype: Dtype

    @nn.compact
    def __call__(self, image: Float[Array, "b i f"]) -> Float[Array, "b i d"]:
        norm = partial(LayerNorm, eps=1e-5, affine=True, dtype=self.dtype)
        exact = partial(jax.nn.gelu, approximate=False)
        mlp = MLP(image.shape[-1], self.dim, act=exact, dtype=self.dtype, name="mlp")
        return norm(name="norm_out")(mlp(norm(name="norm")(image)))
