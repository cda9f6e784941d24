"""The VAEs of Wan 2.1 and 2.2 (arXiv:2503.20314): video `b 1+4k h w 3` to latents `b 1+k h' w' z` and back.

Causal convolutions, a norm of each position, and attention within each frame at the lowest resolution: no number knows
a later frame. Convolutions stride time and leave a video's first frame as it is, so an image is a video of one frame.
Wan 2.2 adds patches of 2x2 pixels and, around each level, shortcuts that average or copy (DC-AE, arXiv:2410.10733).
"""

import math
from functools import partial

import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import linen as nn

from vgjax.attention.full import Full
from vgjax.errors import UserError
from vgjax.nn.causal import CausalConv3D, CausalFold, CausalUnfold, CausalUpsample, started
from vgjax.nn.codec import check_video, decode_stream, encode_stream, from_uint8, latent_shape
from vgjax.nn.heads import QKV, Merge
from vgjax.nn.norm import RMSNorm
from vgjax.parallel.sharding import shard
from vgjax.typing import Array, Dtype, Float, Params, Sizes, UInt8

SIZES: Sizes = {
    "wan2.1": dict(width=96),
    # Of the 5-billion model; 4x16x16.
    "wan2.2": dict(width=160, decoder_width=256, latent_channels=48, patch=2, shortcuts=True),
}
# Small activations are not damped: the published norm holds the length of a position above 1e-12, nothing more.
EPS = 1e-24


class WanVAE(nn.Module):
    """`encode(video) -> (mean, logvar)` and `decode(z) -> video`; video in [-1, 1], `decode` does not clip.

    width, decoder_width: channels of the finest level of encoder and decoder (None: the same), times `multipliers` at
    each level. blocks: of a level of the encoder; the decoder has one more. time: strides between the levels, 1 or 2;
    space is always halved. shortcuts: those of Wan 2.2.
    """

    width: int = 96
    decoder_width: int | None = None
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    time: tuple[int, ...] = (1, 2, 2)
    latent_channels: int = 16
    patch: int = 1
    shortcuts: bool = False
    remat: bool = False
    dtype: Dtype = jnp.float32

    rows = 1  # clips that are encoded at a time: it streams them, as published

    def setup(self) -> None:
        if len(self.time) != len(self.multipliers) - 1 or not set(self.time) <= {1, 2}:
            raise UserError(
                f"a Wan VAE of {len(self.multipliers)} levels (multipliers {self.multipliers}) needs "
                f"{len(self.multipliers) - 1} strides in time, each 1 or 2, but time is {self.time}"
            )
        down, up = self.channels
        if self.shortcuts:
            _check_shortcuts("encoder", down, (*(4 * time for time in self.time), 1))
            _check_shortcuts("decoder", up[::-1][1:], tuple(4 * time for time in self.time[:-1]))
        rest = dict(shortcuts=self.shortcuts, remat=self.remat, dtype=self.dtype)
        self.patchify, self.unpatchify = CausalFold(1, self.patch), CausalUnfold(1, self.patch)
        self.encoder = Encoder(down, self.time, self.blocks, 2 * self.latent_channels, **rest)
        self.decoder = Decoder(up, self.time[::-1], self.blocks + 1, 3 * self.patch**2, **rest)
        pointwise = partial(CausalConv3D, kernel=(1, 1, 1), dtype=self.dtype)
        self.to_latent, self.from_latent = pointwise(2 * self.latent_channels), pointwise(self.latent_channels)

    def __call__(self, video: Float[Array, "b t h w 3"]) -> tuple[Array, Array, Array]:
        """`(reconstruction of the mean, mean, logvar)`."""
        mean, logvar = self.encode(video)
        return self.decode(mean), mean, logvar

    def encode(self, video: Float[Array, "b t h w 3"]) -> tuple[Float[Array, "b s i j z"], Float[Array, "b s i j z"]]:
        """Mean and log-variance of the posterior, fp32."""
        check_video(*video.shape[1:4], self.time_factor, self.space_factor, bool(self.variables.get("cache")))
        moments = self.to_latent(self.encoder(self.patchify(video))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w 3"]:
        """Video of the latents, fp32."""
        return self.unpatchify(self.decoder(self.from_latent(z)).astype(jnp.float32))

    @property
    def channels(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the encoder, before its first level and in each; of the decoder, in each of its levels."""
        down = tuple(self.width * multiplier for multiplier in (1, *self.multipliers))
        return down, tuple((self.decoder_width or self.width) * multiplier for multiplier in self.multipliers[::-1])

    @nn.nowrap
    def encode_video(self, params: Params, clips: UInt8[Array, "b t h w 3"]) -> Float[Array, "b s i j z"]:
        """Mean latents of clips, a latent frame at a time, so that memory does not grow with their length."""
        return encode_stream(self, params, from_uint8(clips), self.time_factor)[0]

    @nn.nowrap
    def decode_video(self, params: Params, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w 3"]:
        """Video of latents, one latent frame at a time."""
        return decode_stream(self, params, z, 1)

    @property
    def time_factor(self) -> int:
        return math.prod(self.time)

    @property
    def space_factor(self) -> int:
        return self.patch * 2 ** len(self.time)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`t h w c` of the latents of one video."""
        return latent_shape((frames, height, width), self.time_factor, self.space_factor, self.latent_channels)


def _check_shortcuts(half: str, channels: tuple[int, ...], volumes: tuple[int, ...]) -> None:
    """A `UserError` where one of `volumes` positions of a level, from fine to coarse, does not fill the next evenly."""
    for fine, coarse, volume in zip(channels[:-1], channels[1:], volumes, strict=True):
        if fine * volume % coarse:
            raise UserError(
                f"the shortcut between levels of {fine} and {coarse} channels of the {half} needs {coarse} to divide "
                f"{volume} x {fine}: choose other multipliers, or shortcuts=False"
            )


class Pyramid(nn.Module):
    """What encoder and decoder share: `channels` before the first level and of each, or of each in the decoder."""

    channels: tuple[int, ...]
    time: tuple[int, ...]
    blocks: int
    features: int
    shortcuts: bool
    remat: bool
    dtype: Dtype

    def conv(self, features: int, name: str) -> CausalConv3D:
        return CausalConv3D(features, dtype=self.dtype, name=name)

    def residual(self, x: Array, features: int, level: int | str, blocks: int = 1, first: int = 0) -> Array:
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        for i in range(first, first + blocks):
            x = block(features, self.dtype, name=f"block_{level}_{i}")(x)
        return x

    def middle(self, x: Array) -> Array:
        x = self.residual(x, x.shape[-1], "mid")
        x = FrameAttention(self.dtype, name="attention")(x)
        return self.residual(x, x.shape[-1], "mid", first=1)

    def head(self, x: Array) -> Array:
        return self.conv(self.features, "conv_out")(nn.silu(_norm(self.dtype, "norm_out")(x)))


class Encoder(Pyramid):
    """Patches of pixels to what the posterior is read from."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j z"]:
        x = self.conv(self.channels[0], "conv_in")(x)
        strides = (*((time, 2) for time in self.time), (1, 1))
        for level, (features, (time, space)) in enumerate(zip(self.channels[1:], strides, strict=True)):
            before, x = x, self.residual(x, features, level, self.blocks)
            if space > 1:
                x = Down(time, self.dtype, name=f"down_{level}")(x)
            if self.shortcuts:
                x = x + Average(features, time, space, name=f"average_{level}")(before)
        return self.head(self.middle(x))


class Decoder(Pyramid):
    """Latents to patches of pixels."""

    @nn.compact
    def __call__(self, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w c"]:
        x = self.middle(self.conv(self.channels[0], "conv_in")(z))
        for level, features in enumerate(self.channels):
            before, x = x, self.residual(x, features, level, self.blocks)
            if level == len(self.time):
                break
            time, name = self.time[level], f"up_{level}"
            if self.shortcuts:
                copies = Copy(features, time, 2, name=f"copy_{level}")(before)
                x = Up(features, time, self.dtype, name=name)(x) + copies
            else:
                x = Up(features // 2, time, self.dtype, name=name)(x)
        return self.head(x)


class ResidualBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`, `x` by a pointwise convolution where its width changes."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w d"]:
        conv = partial(CausalConv3D, self.features, dtype=self.dtype)
        y = conv(name="conv_1")(nn.silu(_norm(self.dtype, "norm_1")(x)))
        y = conv(name="conv_2")(nn.silu(_norm(self.dtype, "norm_2")(y)))
        if x.shape[-1] != self.features:
            x = conv(kernel=(1, 1, 1), name="shortcut")(x)
        return shard(x + y, "batch", None, "height", "width", None)


class FrameAttention(nn.Module):
    """Every position sees all of its own frame; one head."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        # Their order means nothing to attention: with the width outside, queries stay on the device of their columns.
        y = rearrange(_norm(self.dtype, "norm")(x), "b t h w c -> (b t) (w h) c")
        o = Full()(*QKV(1, norm=False, dtype=self.dtype, name="qkv")(y))
        o = Merge(x.shape[-1], dtype=self.dtype, name="merge")(o)
        o = rearrange(o, "(b t) (w h) c -> b t h w c", t=x.shape[1], h=x.shape[2])
        return shard(x + o, "batch", None, "height", "width", None)


class Down(nn.Module):
    """Space halved by a strided convolution, then time too where the stride `time` is 2."""

    time: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j c"]:
        conv = partial(CausalConv3D, x.shape[-1], dtype=self.dtype)
        x = conv((1, 3, 3), (1, 2, 2), centred=False, name="spatial")(x)
        if self.time == 1:
            return x
        y = conv((3, 1, 1), (2, 1, 1), name="temporal")(x)
        return y if started(self) else jnp.concatenate([x[:, :1], y[:, 1:]], axis=1)


class Up(nn.Module):
    """Time doubled by a convolution where the stride `time` is 2, then space by nearest neighbours."""

    features: int
    time: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j d"]:
        conv = partial(CausalConv3D, dtype=self.dtype)
        if self.time == 2:
            starts = not started(self)
            # The published model begins its convolution behind the first frame and does not show it that frame.
            seen = x.at[:, 0].set(0) if starts else x
            y = CausalUnfold(2, name="unfold")(conv(2 * x.shape[-1], (3, 1, 1), name="temporal")(seen))
            x = jnp.concatenate([x[:, :1], y[:, 1:]], axis=1) if starts else y
        x = CausalUpsample(1, 2, name="nearest")(x)
        return conv(self.features, (1, 3, 3), name="spatial")(x)


class Average(nn.Module):
    """A shortcut down: the positions that become one, folded to channels, and `features` averages of neighbours."""

    features: int
    time: int
    space: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j d"]:
        x = CausalFold(self.time, self.space, "zeros", name="fold")(x)
        return reduce(x, "b t h w (d n) -> b t h w d", "mean", d=self.features)


class Copy(nn.Module):
    """A shortcut up: each channel copied as often as there is room, and unfolded to `features`."""

    features: int
    time: int
    space: int

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j d"]:
        copies = self.features * self.time * self.space**2 // x.shape[-1]
        x = repeat(x, "b t h w c -> b t h w (c n)", n=copies)
        return CausalUnfold(self.time, self.space, name="unfold")(x)


def _norm(dtype: Dtype, name: str) -> RMSNorm:
    return RMSNorm(eps=EPS, dtype=dtype, name=name)
