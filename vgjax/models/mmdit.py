"""MM-DiT: the velocity of a latent video, given time and text; the HunyuanVideo (2412.03603), SD3 and Flux family.

Dual-stream blocks keep video and text tokens in streams of their own (QKV, MLP and modulation each) that meet in one
joint attention; single-stream blocks then treat the joined sequence as one. The joint order is video, then text, on
each device that shares the tokens (`attention.parallel.join`); text tokens sit at rotary position 0, which turns
nothing. A pooled text vector, time and optionally guidance modulate.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from vgjax.attention.full import Full
from vgjax.attention.parallel import fill, join, part
from vgjax.attention.segments import among
from vgjax.errors import UserError
from vgjax.nn import dit, patch, rope
from vgjax.nn.embed import ScalarEmbed
from vgjax.nn.heads import QKV, Merge
from vgjax.nn.linear import Linear
from vgjax.nn.mlp import MLP
from vgjax.nn.modulation import Modulation, gated, modulate
from vgjax.nn.norm import LayerNorm
from vgjax.nn.stack import Stack
from vgjax.parallel.sharding import shard
from vgjax.typing import Array, Attention, Bool, Dtype, Float, Int, Json, Sizes

SIZES: Sizes = {
    "quickstart": dict(
        dim=192,
        heads=6,
        double_blocks=2,
        single_blocks=4,
        refiner_blocks=1,
        rope_dims=(8, 12, 12),
        absolute=True,
        scan=False,
    ),
    "s": dict(dim=384, heads=6, double_blocks=3, single_blocks=6),
    "b": dict(dim=768, heads=12, double_blocks=3, single_blocks=6),
    "l": dict(dim=1024, heads=16, double_blocks=6, single_blocks=12),
    "2b": dict(dim=1536, heads=12, double_blocks=12, single_blocks=24, remat="full"),
    # HunyuanVideo, 12.82 billion parameters.
    "13b": dict(
        dim=3072,
        heads=24,
        double_blocks=20,
        single_blocks=40,
        channels=16,
        text_dim=4096,
        pooled_dim=768,
        guidance=True,
        remat="full",
    ),
}

REFINER_RATIO = 4  # of the text refiner's MLP, whatever `mlp_ratio` is, as published
Tokens = Float[Array, "b n d"]
Streams = tuple[Tokens, Float[Array, "b m d"]]


class MMDiT(nn.Module):
    """`MMDiT(**SIZES["b"], channels=16, text_dim=512, pooled_dim=512)`: velocity of latents, fp32.

    channels, text_dim, pooled_dim: widths of the latents, of the text tokens and of the pooled text vector.
    conditions: channels that stand behind the latents in the input.
    rope_dims, theta: channels of a head for t, h, w (None: like 16, 56, 56 of 128) and the period of the slowest.
    guidance: embed the scale of a guidance-distilled model. remat, scan: see `nn.stack`.
    dtype: of the matmuls; norms, modulation, gates and softmax are fp32. stream: type of the residual stream between
    blocks (None: `dtype`, as HunyuanVideo is published); fp32 halves the error of deep models in bf16 and doubles what
    is kept of every block for the backward pass (benchmarks/residual.py).
    """

    dim: int
    heads: int
    double_blocks: int
    single_blocks: int
    channels: int
    text_dim: int
    pooled_dim: int
    conditions: int = 0
    mlp_ratio: float = 4.0
    patch: tuple[int, int, int] = (1, 2, 2)
    rope_dims: tuple[int, int, int] | None = None
    theta: float = 256.0
    absolute: bool = False
    guidance: bool = False
    refiner_blocks: int = 2
    remat: str = "none"
    scan: bool = True
    attention: Attention = Full()
    dtype: Dtype = jnp.float32
    stream: Dtype | None = None

    def __call__(
        self,
        x: Float[Array, "b t h w z"],
        t: Float[Array, " b"],
        c: Float[Array, "b m e"],
        mask: Bool[Array, "b m"],
        vec: Float[Array, "b p"],
        guidance: Float[Array, " b"] | None = None,
    ) -> Float[Array, "b t h w c"]:
        """x: noisy latents (and conditions); t: 0 noise to 1 data; c, mask, vec: text tokens, which of them are real,
        pooled text."""
        grid = self._check(x, c, vec, guidance)
        tokens, places = patch.patchify(x, self.patch), patch.positions(grid)[None]
        ones = jnp.ones(tokens.shape[:2], jnp.int32)
        t, vec, guidance = (None if one is None else one[:, None] for one in (t, vec, guidance))
        v = self.packed(tokens, places, ones, t, c, mask.astype(jnp.int32), vec, guidance)
        return patch.unpatchify(v, self.patch, grid)

    @nn.compact
    def packed(
        self,
        x: Float[Array, "b n a"],
        places: Int[Array, "#b n 3"],
        of_x: Int[Array, "b n"],
        t: Float[Array, "b s"],
        c: Float[Array, "b m e"],
        of_c: Int[Array, "b m"],
        vec: Float[Array, "b s p"],
        guidance: Float[Array, "b s"] | None = None,
    ) -> Float[Array, "b n _"]:
        """Rows of `s` samples of any sizes, one behind the other: the velocity of every patch.

        x: patches (`nn.patch`), places: where each lies in its own video, of_x and of_c: to which sample of the row a
        patch or text token belongs, from 1 on, 0 for padding. Samples do not see each other.
        """
        n = x.shape[1]
        x, of_x, places, c, of_c = map(fill, (x, of_x, places, c, of_c))
        text = c.shape[1]
        block = dict(heads=self.heads, inner=int(self.mlp_ratio * self.dim), attention=self.attention, dtype=self.dtype)
        stack = partial(Stack, remat=self.remat, scan=self.scan)

        condition = ScalarEmbed(self.dim, name="time")(t) + _embed(self.dim, "pooled")(vec)
        if self.guidance:
            condition = condition + ScalarEmbed(self.dim, name="guidance")(guidance)
        condition = jax.nn.silu(condition)

        x = Linear(self.dim, (None, "embed"), dtype=self.dtype, name="patches")(x)
        refiner = block | {"inner": REFINER_RATIO * self.dim}
        c = TextRefiner(self.dim, self.refiner_blocks, refiner, stack, name="refiner")(c, of_c, t)
        if self.absolute:
            x = x + Linear(self.dim, (None, "embed"), dtype=self.dtype, name="places")(rope.waves(places, 16))
        x, c = (shard(y.astype(self.stream or self.dtype), "batch", "tokens", None) for y in (x, c))
        ids = join(places, jnp.zeros((len(places), text, 3), places.dtype))
        turn = rope.rotation(ids, self._rope_dims(), self.theta)
        samples = join(of_x, of_c)

        double = stack(partial(DoubleStreamBlock, **block), self.double_blocks, name="double")
        single = stack(partial(SingleStreamBlock, **block), self.single_blocks, name="single")
        x, c = double((x, c), condition, turn, samples)
        x, _ = part(single(join(x, c), condition, turn, samples), text)

        shift, scale = Modulation(self.dim, 2, name="modulation")(condition, of_x)
        return dit.last(x, shift, scale, math.prod(self.patch) * self.channels, self.dtype)[:, :n]

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Video tokens of a latent grid `t h w`; a `UserError` where the patch does not divide it."""
        return math.prod(patch.check(grid, self.patch))

    def _rope_dims(self) -> tuple[int, int, int]:
        return self.rope_dims or rope.split(self.dim // self.heads)

    def _check(self, x: Array, c: Array, vec: Array, guidance: Array | None) -> tuple[int, int, int]:
        """The grid of patches; a `UserError` for sizes that do not fit each other."""
        wanted = {"channels + conditions": (self.channels + self.conditions, x)}
        wanted |= {"text_dim": (self.text_dim, c), "pooled_dim": (self.pooled_dim, vec)}
        dit.check(self.dim, self.heads, self._rope_dims, wanted)
        if self.guidance != (guidance is not None):
            raise UserError(
                f"guidance is {self.guidance}: the call must {'give' if self.guidance else 'not give'} a scale"
            )
        return patch.check(x.shape[1:4], self.patch)


class DoubleStreamBlock(nn.Module):
    """Two streams with weights of their own, one joint attention."""

    heads: int
    inner: int
    attention: Attention
    dtype: Dtype

    @nn.compact
    def __call__(
        self, streams: Streams, condition: Float[Array, "b s d"], turn: rope.Rotation, samples: Int[Array, "b j"]
    ) -> Streams:
        x, c = streams
        dim = x.shape[-1]
        video = Stream(dim, self.heads, self.inner, self.dtype, name="video")
        text = Stream(dim, self.heads, self.inner, self.dtype, name="text")
        of_x, of_c = part(samples, c.shape[1])
        video_vectors, text_vectors = video.modulation(condition, of_x), text.modulation(condition, of_c)
        qkv = zip(video.before(x, video_vectors), text.before(c, text_vectors), strict=True)
        q, k, v = (join(*pair) for pair in qkv)
        of_video, of_text = part(_attend(self.attention, q, k, v, turn, samples), c.shape[1])
        x, c = video.after(x, of_video, video_vectors), text.after(c, of_text, text_vectors)
        return shard(x, "batch", "tokens", None), shard(c, "batch", "tokens", None)


class Stream(nn.Module):
    """What one stream does before and after the joint attention."""

    dim: int
    heads: int
    inner: int
    dtype: Dtype

    def setup(self) -> None:
        self.norm = LayerNorm()
        self.modulation = Modulation(self.dim, 6)
        self.qkv = QKV(self.heads, dtype=self.dtype)
        self.merge = Merge(self.dim, dtype=self.dtype)
        self.mlp = MLP(self.inner, dtype=self.dtype)

    def before(self, x: Tokens, vectors: list[Array]) -> tuple[Array, Array, Array]:
        shift, scale, *_ = vectors
        return self.qkv(modulate(self.norm(x), shift, scale, self.dtype))

    def after(self, x: Tokens, o: Float[Array, "b n h k"], vectors: list[Array]) -> Tokens:
        _, _, gate, shift_mlp, scale_mlp, gate_mlp = vectors
        x = gated(x, self.merge(o), gate)
        return gated(x, self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp, self.dtype)), gate_mlp)


class SingleStreamBlock(nn.Module):
    """Attention and MLP side by side on the joined sequence (Dehghani et al. 2023)."""

    heads: int
    inner: int
    attention: Attention
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Tokens, condition: Float[Array, "b s d"], turn: rope.Rotation, samples: Int[Array, "b n"]
    ) -> Tokens:
        dim = x.shape[-1]
        shift, scale, gate = Modulation(dim, 3, name="modulation")(condition, samples)
        y = modulate(LayerNorm(name="norm")(x), shift, scale, self.dtype)
        q, k, v = QKV(self.heads, dtype=self.dtype, name="qkv")(y)
        o = _attend(self.attention, q, k, v, turn, samples)
        # The one bias of the joined output projection is the MLP's.
        out = Merge(dim, use_bias=False, dtype=self.dtype, name="merge")(o)
        out = out + MLP(self.inner, dtype=self.dtype, name="mlp")(y)
        return shard(gated(x, out, gate), "batch", "tokens", None)


class TextRefiner(nn.Module):
    """Text tokens to the model's width, through blocks gated by time and the mean of a sample's tokens."""

    dim: int
    blocks: int
    block: Json
    stack: Callable[..., Stack]

    @nn.compact
    def __call__(
        self, c: Float[Array, "b m e"], samples: Int[Array, "b m"], t: Float[Array, "b s"]
    ) -> Float[Array, "b m d"]:
        x = Linear(self.dim, (None, "embed"), dtype=self.block["dtype"], name="tokens")(c)
        if not self.blocks:
            return x
        weights = jax.nn.one_hot(samples - 1, t.shape[1])
        total = jnp.einsum("bms,bme->bse", weights, c.astype(jnp.float32), precision="highest")
        mean = total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)[:, :, None]
        condition = jax.nn.silu(ScalarEmbed(self.dim, name="time")(t) + _embed(self.dim, "pooled")(mean))
        blocks = self.stack(partial(RefinerBlock, **self.block), self.blocks, name="blocks")
        return blocks(x, condition, samples)


class RefinerBlock(nn.Module):
    """A pre-norm transformer block whose two residuals are gated."""

    heads: int
    inner: int
    attention: Attention
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Tokens, condition: Float[Array, "b s d"], samples: Int[Array, "b n"]) -> Tokens:
        gate, gate_mlp = Modulation(x.shape[-1], 2, name="modulation")(condition, samples)
        norm = partial(LayerNorm, affine=True, dtype=self.dtype)
        q, k, v = QKV(self.heads, norm=False, dtype=self.dtype, name="qkv")(norm(name="norm")(x))
        o = self.attention(q, k, v, among(samples))
        x = gated(x, Merge(x.shape[-1], dtype=self.dtype, name="merge")(o), gate)
        mlp = MLP(self.inner, act=jax.nn.silu, dtype=self.dtype, name="mlp")
        return shard(gated(x, mlp(norm(name="norm_mlp")(x)), gate_mlp), "batch", "tokens", None)


def _attend(attention: Attention, q: Array, k: Array, v: Array, turn: rope.Rotation, samples: Array) -> Array:
    q, k, v = (shard(a, "batch", "tokens", "heads", None) for a in (rope.rotate(q, turn), rope.rotate(k, turn), v))
    return attention(q, k, v, among(samples))


def _embed(dim: int, name: str) -> MLP:
    return MLP(dim, dim, act=jax.nn.silu, name=name)
