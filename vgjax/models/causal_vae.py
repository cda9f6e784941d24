"""Causal 3D VAE: video `b 1+4k h w 3` to latents `b 1+k h' w' z` and back; an image is a video of one frame.

A convolutional VAE in the line of MAGVIT-v2 (arXiv:2310.05737), HunyuanVideo (2412.03603) and Wan (2503.20314): causal
convolutions, per-position RMS norm (a GroupNorm over time would see the future), strided down-sampling, nearest
up-sampling. Pixels may enter and leave in patches, so that no layer runs at full resolution. Around encoder and decoder
lies one linear map each, born as the cosine transform: the network starts as a good low-pass codec and learns the rest.
"""

import functools
import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from vgjax.errors import UserError
from vgjax.nn.causal import CausalConv3D, CausalFold, CausalUnfold, CausalUpsample, Padding
from vgjax.nn.codec import check_video, encode_mean, latent_shape, run
from vgjax.nn.norm import RMSNorm
from vgjax.parallel.sharding import shard
from vgjax.typing import Array, Dtype, Float, Key, Params, Sizes, UInt8

SIZES: Sizes = {
    # 4x4x4 with 16 channels: the quickstart's 9x32x32 clips become 3x8x8. Few, wide positions: that is where a CPU
    # convolves fastest.
    "tiny": dict(
        width=64, multipliers=(1, 1), blocks=0, time=(2,), space=(1,), patch_frames=2, patch=4, latent_channels=16
    ),
    # 4x8x8 with 16 channels: real footage from 64x64 on.
    "small": dict(width=48, multipliers=(1, 2, 4), blocks=1, time=(2, 2), space=(1, 2), patch=4, latent_channels=16),
    # The field's compression and width (Wan 2.1: base 96; HunyuanVideo: base 128).
    "4x8x8": dict(width=96, multipliers=(1, 2, 4, 4), blocks=2, time=(1, 2, 2), space=(2, 2, 2), latent_channels=16),
}
LOGVAR = -10.0  # of the posterior at birth: noise far below the signal, so that the first steps see what they encode


class CausalVAE(nn.Module):
    """`encode(video) -> (mean, logvar)` and `decode(z) -> video`; video in [-1, 1], `decode` does not clip.

    `multipliers` has one entry a level; `time` and `space` are the strides between levels, one entry less. Frames must
    be `1 + time_factor * k`, height and width multiples of `space_factor`: anything else is a UserError.
    """

    width: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    time: tuple[int, ...] = (1, 2, 2)
    space: tuple[int, ...] = (2, 2, 2)
    latent_channels: int = 16
    patch: int = 1
    patch_frames: int = 1
    padding: Padding = "zeros"
    remat: bool = False
    dtype: Dtype = jnp.float32

    rows = 32  # clips that are encoded at a time, at most: their frames are taken at once

    def setup(self) -> None:
        levels = len(self.multipliers)
        if len(self.time) != levels - 1 or len(self.space) != levels - 1:
            raise UserError(
                f"a causal VAE of {levels} levels (multipliers {self.multipliers}) needs {levels - 1} strides, "
                f"but time is {self.time} and space is {self.space}"
            )
        volume = (self.time_factor, self.space_factor, self.space_factor)
        if not 1 <= self.latent_channels <= 3 * math.prod(volume):
            raise UserError(
                f"latent_channels is {self.latent_channels}: a latent stands for {3 * math.prod(volume)} numbers, "
                f"so choose from 1 to {3 * math.prod(volume)}"
            )
        channels = tuple(self.width * multiplier for multiplier in self.multipliers)
        shape = (channels, tuple(zip(self.time, self.space, strict=True)), self.blocks)
        rest = dict(padding=self.padding, remat=self.remat, dtype=self.dtype)
        patch = (self.patch_frames, self.patch)
        self.patchify, self.unpatchify = CausalFold(*patch), CausalUnfold(*patch)
        self.encoder = Encoder(*shape, features=2 * self.latent_channels, **rest)
        self.decoder = Decoder(*shape, features=3 * self.patch_frames * self.patch**2, **rest)
        self.fold, self.unfold = CausalFold(*volume[:2]), CausalUnfold(*volume[:2])
        cosine = functools.partial(cosines, volume=volume)
        linear = functools.partial(CausalConv3D, kernel=(1, 1, 1), kernel_init=cosine)
        self.analysis, self.synthesis = linear(self.latent_channels), linear(3 * math.prod(volume))

    def __call__(self, video: Float[Array, "b t h w 3"]) -> tuple[Array, Array, Array]:
        """`(reconstruction of the mean, mean, logvar)`."""
        mean, logvar = self.encode(video)
        return self.decode(mean), mean, logvar

    def encode(self, video: Float[Array, "b t h w 3"]) -> tuple[Float[Array, "b s i j z"], Float[Array, "b s i j z"]]:
        """Mean and log-variance of the posterior, fp32."""
        check_video(*video.shape[1:4], self.time_factor, self.space_factor, bool(self.variables.get("cache")))
        mean, logvar = jnp.split(self.encoder(self.patchify(video)).astype(jnp.float32), 2, axis=-1)
        return mean + self.analysis(self.fold(video)), jnp.clip(logvar + LOGVAR, -30.0, 20.0)

    def decode(self, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w 3"]:
        """Video of the latents, fp32."""
        return self.unpatchify(self.decoder(z).astype(jnp.float32)) + self.unfold(self.synthesis(z))

    @nn.nowrap
    def encode_video(self, params: Params, clips: UInt8[Array, "b t h w 3"]) -> Float[Array, "b s i j z"]:
        """Mean latents of clips."""
        return encode_mean(self, params, clips)

    @nn.nowrap
    def decode_video(self, params: Params, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w 3"]:
        """Video of latents."""
        return run(self, "decode", params, {}, z)[0]

    @property
    def time_factor(self) -> int:
        return self.patch_frames * math.prod(self.time)

    @property
    def space_factor(self) -> int:
        return self.patch * math.prod(self.space)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`t h w c` of the latents of one video."""
        return latent_shape((frames, height, width), self.time_factor, self.space_factor, self.latent_channels)


class Pyramid(nn.Module):
    """What encoder and decoder share: `channels` of each level, `strides` (time, space) between, `features` out."""

    channels: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]
    blocks: int
    features: int
    padding: Padding = "zeros"
    remat: bool = False
    dtype: Dtype = jnp.float32

    def conv(self, features: int, name: str, stride: tuple[int, int] = (1, 1), **rest: object) -> CausalConv3D:
        time, space = stride
        rest = dict(padding=self.padding, dtype=self.dtype, name=name, **rest)
        return CausalConv3D(features, stride=(time, space, space), **rest)

    def residual(self, x: Array, level: int | str, blocks: int) -> Array:
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        for i in range(blocks):
            x = block(x.shape[-1], self.padding, self.dtype, name=f"block_{level}_{i}")(x)
        return x

    def head(self, x: Array) -> Array:
        x = nn.silu(RMSNorm(dtype=self.dtype, name="norm_out")(x))
        return self.conv(self.features, "conv_out", kernel_init=nn.initializers.zeros)(x)


class Encoder(Pyramid):
    """Patches of pixels to the posterior's mean and log-variance."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j z"]:
        x = self.residual(self.conv(self.channels[0], "conv_in")(x), 0, self.blocks)
        for level, stride in enumerate(self.strides, start=1):
            x = self.conv(self.channels[level], f"down_{level}", stride)(x)
            x = self.residual(x, level, self.blocks)
        return self.head(self.residual(x, "mid", 1))


class Decoder(Pyramid):
    """Latents to patches of pixels; the encoder backwards."""

    @nn.compact
    def __call__(self, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w c"]:
        x = self.residual(self.conv(self.channels[-1], "conv_in")(z), "mid", 1)
        for level, stride in reversed(list(enumerate(self.strides, start=1))):
            x = CausalUpsample(*stride, name=f"nearest_{level}")(self.residual(x, level, self.blocks))
            x = self.conv(self.channels[level - 1], f"up_{level}")(x)
        return self.head(self.residual(x, 0, self.blocks))


class ResidualBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))`, the last convolution born zero."""

    features: int
    padding: Padding = "zeros"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b t h w c"]:
        conv = functools.partial(CausalConv3D, self.features, padding=self.padding, dtype=self.dtype)
        y = conv(name="conv_1")(nn.silu(RMSNorm(dtype=self.dtype, name="norm_1")(x)))
        y = nn.silu(RMSNorm(dtype=self.dtype, name="norm_2")(y))
        x = x + conv(name="conv_2", kernel_init=nn.initializers.zeros)(y)
        return shard(x, "batch", None, "height", "width", None)


def cosines(key: Key, shape: tuple[int, ...], dtype: Dtype, volume: tuple[int, int, int]) -> Float[Array, "..."]:
    """Initialiser of a linear map between a `volume` (t, h, w) of pixels and its lowest DCT-II frequencies.

    The longer of the last two dims of `shape` holds pixels in the order of `CausalFold`, the shorter frequencies, each
    with its three colours. Pixels to latents and back is the orthogonal projection. Frequency f is amplified by
    `1 + 16 f`, since the amplitudes of moving pictures fall like 1/f: latents of one scale learn faster.
    """
    steps = [np.arange(n) for n in volume]
    waves = [np.cos(np.pi * x[:, None] * (x + 0.5) / len(x)) * np.where(x, 2**0.5, 1.0)[:, None] for x in steps]
    frequency = np.sqrt(sum(axis**2 for axis in np.meshgrid(*(x / len(x) for x in steps), indexing="ij")))
    lowest = np.argsort(frequency, axis=None, kind="stable")
    chosen = zip(waves, np.unravel_index(lowest, volume), strict=True)
    basis = np.einsum("fr,fp,fq->frpq", *(wave[index] for wave, index in chosen))
    basis = np.einsum("frpq,cd->fdcrpq", basis, np.eye(3))
    basis = rearrange(basis, "f d c r p q -> (f d) (c r p q)")[: min(shape[-2:])]
    gain = np.repeat(1.0 + 16.0 * frequency.ravel()[lowest], 3)[: len(basis), None]
    matrix = (basis * gain / math.prod(volume)).T if shape[-2] > shape[-1] else basis / gain
    return jnp.asarray(matrix, dtype)[None, None, None]
