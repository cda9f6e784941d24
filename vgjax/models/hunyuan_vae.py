"""HunyuanVideo's VAE (Kong et al. 2024, arXiv:2412.03603): video `b 1+4k h w 3` to latents `b 1+k h/8 w/8 16` and back.

Causal convolutions padded with the nearest pixel in time and space, and in the middle an attention of which each frame
sees itself and those before. Its GroupNorms span all frames of a video: convolution and attention see no later frame,
but the statistics that they are scaled by do, so this codec neither streams nor is it exact in tiles.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn

from vgjax.attention.full import Full
from vgjax.errors import UserError
from vgjax.nn.causal import CausalConv3D, CausalUpsample
from vgjax.nn.codec import check_video, from_uint8, latent_shape, run
from vgjax.nn.heads import QKV, Merge
from vgjax.nn.norm import GroupNorm
from vgjax.parallel import sharding
from vgjax.parallel.sharding import shard
from vgjax.typing import Array, Dtype, Float, Params, Sizes, UInt8

SIZES: Sizes = {
    # HunyuanVideo, 246 million parameters.
    "hunyuan": dict(channels=(128, 256, 512, 512), blocks=2, groups=32, latent_channels=16)
}
CLIP, STRIDE = 16, 12  # frames of a clip, beside its first, and between the starts of two, as published


class HunyuanVAE(nn.Module):
    """`encode(video) -> (mean, logvar)` and `decode(z) -> video`; video in [-1, 1], `decode` does not clip.

    channels: of each level. blocks: residual ones a level; the decoder has one more. groups: of each norm.
    Frames must be `1 + time_factor * k`, height and width multiples of `space_factor`: anything else is a UserError.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    latent_channels: int = 16
    time_factor: int = 4
    space_factor: int = 8
    remat: bool = False
    dtype: Dtype = jnp.float32

    rows = 1  # clips that are encoded at a time: it streams them, as published

    def setup(self) -> None:
        wrong = [width for width in self.channels if width % self.groups]
        if wrong:
            raise UserError(
                f"channels {self.channels} of a VAE do not all divide into {self.groups} groups; "
                f"instead of {wrong[0]} use {max(1, round(wrong[0] / self.groups)) * self.groups}"
            )
        shape = (self.channels, strides(len(self.channels), self.time_factor, self.space_factor))
        rest = dict(groups=self.groups, remat=self.remat, dtype=self.dtype)
        self.encoder = Encoder(*shape, self.blocks, 2 * self.latent_channels, **rest)
        self.decoder = Decoder(*shape, self.blocks + 1, 3, **rest)
        linear = functools.partial(CausalConv3D, kernel=(1, 1, 1))
        self.quant, self.post_quant = linear(2 * self.latent_channels), linear(self.latent_channels)

    def __call__(self, video: Float[Array, "b t h w 3"]) -> tuple[Array, Array, Array]:
        """`(reconstruction of the mean, mean, logvar)`."""
        mean, logvar = self.encode(video)
        return self.decode(mean), mean, logvar

    def encode(self, video: Float[Array, "b t h w 3"]) -> tuple[Float[Array, "b s i j z"], Float[Array, "b s i j z"]]:
        """Mean and log-variance of the posterior, fp32."""
        self._check_whole()
        check_video(*video.shape[1:4], self.time_factor, self.space_factor)
        moments = self.quant(self.encoder(video).astype(jnp.float32))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w 3"]:
        """Video of the latents, fp32."""
        self._check_whole()
        return self.decoder(self.post_quant(z)).astype(jnp.float32)

    @nn.nowrap
    def encode_video(self, params: Params, clips: UInt8[Array, "b t h w 3"]) -> Float[Array, "b s i j z"]:
        """Mean latents of clips, as published: see `encode_clips`."""
        return encode_clips(self, params, from_uint8(clips))[0]

    @nn.nowrap
    def decode_video(self, params: Params, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w 3"]:
        """Video of latents, as published: see `decode_clips`."""
        return decode_clips(self, params, z)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`t h w c` of the latents of one video."""
        return latent_shape((frames, height, width), self.time_factor, self.space_factor, self.latent_channels)

    def _check_whole(self) -> None:
        if self.variables.get("cache"):
            raise UserError(
                "HunyuanVideo's VAE cannot go on with a stream, since its norms are over all frames of a video at "
                "once: take whole videos, in tiles where memory is short"
            )


def strides(levels: int, time: int, space: int) -> tuple[tuple[int, int], ...]:
    """(time, space) between the levels and behind the last, for encoder and decoder alike.

    Space is halved, or doubled, at the first levels; time at the last ones that have another behind them.
    """
    halvings = [factor.bit_length() - 1 for factor in (time, space)]
    found = tuple(
        (2 if levels - 1 - halvings[0] <= level < levels - 1 else 1, 2 if level < halvings[1] else 1)
        for level in range(levels)
    )
    if (time, space) != tuple(map(math.prod, zip(*found, strict=True))):
        raise UserError(
            f"{levels} levels cannot compress time {time} and space {space} times: use powers of two, "
            f"at most {2 ** (levels - 1)} and {2**levels}"
        )
    return found


class Pyramid(nn.Module):
    """What encoder and decoder share: `channels` and `strides` (time, space) of each level, `features` out."""

    channels: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]
    blocks: int
    features: int
    groups: int
    remat: bool = False
    dtype: Dtype = jnp.float32

    def conv(self, features: int, name: str, stride: tuple[int, int] = (1, 1)) -> CausalConv3D:
        time, space = stride
        return CausalConv3D(features, stride=(time, space, space), padding="edge", dtype=self.dtype, name=name)

    def residual(self, x: Array, features: int, name: str) -> Array:
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        return block(features, self.groups, self.dtype, name=name)(x)

    def level(self, x: Array, features: int, level: int) -> Array:
        for i in range(self.blocks):
            x = self.residual(x, features, f"block_{level}_{i}")
        return x

    def middle(self, x: Array) -> Array:
        x = self.residual(x, x.shape[-1], "mid_0")
        x = FrameAttention(self.groups, self.dtype, name="attention")(x)
        return self.residual(x, x.shape[-1], "mid_1")

    def head(self, x: Array) -> Array:
        x = nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
        return self.conv(self.features, "conv_out")(x)


class Encoder(Pyramid):
    """Pixels to the posterior's mean and log-variance."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j z"]:
        x = self.conv(self.channels[0], "conv_in")(x)
        for i, (features, stride) in enumerate(zip(self.channels, self.strides, strict=True)):
            x = self.level(x, features, i)
            if stride != (1, 1):
                x = self.conv(features, f"down_{i}", stride)(x)
        return self.head(self.middle(x))


class Decoder(Pyramid):
    """Latents to pixels. The order of the strides is the encoder's own: space alone grows first."""

    @nn.compact
    def __call__(self, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w c"]:
        x = self.middle(self.conv(self.channels[-1], "conv_in")(z))
        for i, (features, stride) in enumerate(zip(reversed(self.channels), self.strides, strict=True)):
            x = self.level(x, features, i)
            if stride != (1, 1):
                x = self.conv(features, f"up_{i}")(CausalUpsample(*stride, name=f"nearest_{i}")(x))
        return self.head(x)


class ResidualBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`; where the width changes, `x` passes a linear map."""

    features: int
    groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        group_norm = functools.partial(GroupNorm, self.groups, dtype=self.dtype)
        conv = functools.partial(CausalConv3D, self.features, padding="edge", dtype=self.dtype)
        y = conv(name="conv_1")(nn.silu(group_norm(name="norm_1")(x)))
        y = conv(name="conv_2")(nn.silu(group_norm(name="norm_2")(y)))
        if x.shape[-1] != self.features:
            x = conv(kernel=(1, 1, 1), name="shortcut")(x)
        return shard(x + y, "batch", None, "height", "width", None)


class FrameAttention(nn.Module):
    """`x` and its self-attention of one head: a position sees all positions of its own frame and of those before."""

    groups: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        _, t, h, _, features = x.shape
        # Rows of pixels as samples: a width that is spread over devices stays where it is.
        rows = rearrange(GroupNorm(self.groups, dtype=self.dtype, name="norm")(x), "b t h w c -> (b t h) w c")
        q, k, v = QKV(1, norm=False, dtype=self.dtype, name="qkv")(rows)
        q, k, v = (rearrange(a, "(b t h) w one c -> b t h w one c", t=t, h=h) for a in (q, k, v))
        own, whole = ("batch", None, None, "width", None, None), ("batch",) + (None,) * 5
        o = sharding.local(frame_causal, (own, whole, whole), q, k, v)
        o = rearrange(o, "b t h w one c -> (b t h) w one c")
        y = Merge(features, dtype=self.dtype, name="merge")(o)
        return x + rearrange(y, "(b t h) w c -> b t h w c", t=t, h=h)


def frame_causal(
    q: Float[Array, "b t h v n k"], k: Float[Array, "b t h w n k"], v: Float[Array, "b t h w n k"]
) -> Float[Array, "b t h v n k"]:
    """Attention of each frame, or of some columns `v` of it, to the frames up to it."""
    # Frame by frame, each with as many keys as it sees: no mask, no score that is thrown away, and `Full` holds those
    # of a chunk of queries at most. A loop that is compiled once would need all keys for every frame: twice the work.
    t, h, size = *q.shape[1:3], k.shape[2] * k.shape[3]
    k, v = (rearrange(a, "b t h w n k -> b (t h w) n k") for a in (k, v))
    attend, seen = Full(), [(i + 1) * size for i in range(t)]
    frames = [rearrange(q[:, i], "b h v n k -> b (h v) n k") for i in range(t)]
    frames = [attend(frame, k[:, :end], v[:, :end]) for frame, end in zip(frames, seen, strict=True)]
    return rearrange(frames, "t b (h v) n k -> b t h v n k", h=h)


def encode_clips(
    model: HunyuanVAE, params: Params, video: Float[Array, "b t h w 3"]
) -> tuple[Float[Array, "b s i j z"], Float[Array, "b s i j z"]]:
    """`encode` as published: longer videos in overlapping clips of `CLIP` frames and one, so that memory is bounded."""
    model.latent_shape(*video.shape[1:4])

    def encode(part: Array) -> Array:
        return jnp.concatenate(run(model, "encode", params, {}, part)[0], axis=-1)

    factor = model.time_factor
    mean, logvar = jnp.split(_in_clips(encode, video, CLIP, STRIDE, CLIP // factor, STRIDE // factor), 2, axis=-1)
    return mean, logvar


def decode_clips(model: HunyuanVAE, params: Params, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w 3"]:
    """`decode` as published, in the clips of `encode_clips`."""
    factor = model.time_factor

    def decode(part: Array) -> Array:
        return run(model, "decode", params, {}, part)[0]

    return _in_clips(decode, z, CLIP // factor, STRIDE // factor, CLIP, STRIDE)


def _in_clips(
    function: Callable[[Array], Array], x: Array, clip: int, stride: int, clip_out: int, stride_out: int
) -> Array:
    """`function` on `clip` + 1 frames at a time; each clip fades in over what the one before has beyond its stride."""
    if x.shape[1] <= clip:
        return function(x)
    parts, before = [], None
    for start in range(0, x.shape[1], stride):
        now = function(x[:, start : start + clip + 1])[:, 1 if start else 0 :]
        if before is not None and now.shape[1]:
            fade = min(before.shape[1], now.shape[1], clip_out - stride_out)
            rise = rearrange(jnp.arange(fade) / fade, "t -> 1 t 1 1 1")
            now = jnp.concatenate([before[:, -fade:] * (1 - rise) + now[:, :fade] * rise, now[:, fade:]], axis=1)
        parts.append(now[:, : stride_out + (not start)])
        before = now
    return jnp.concatenate(parts, axis=1)
