"""Causal 3D VAE: video `b 1+4k h w 3` to latents `b 1+k h' w' z` and back; an image is a video of one frame.

A convolutional VAE in the line of MAGVIT-v2 (arXiv:2310.05737), HunyuanVideo (2412.03603) and Wan (2503.20314): causal
convolutions, per-position RMS norm (a GroupNorm over time would see the future), strided down-sampling, nearest
up-sampling. Pixels enter and leave in `patch x patch` blocks, so that no layer runs at full resolution.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn

from vgjax.errors import UserError
from vgjax.nn.causal import CausalConv3D, CausalDownsample, CausalFold, CausalUnfold, CausalUpsample, Padding
from vgjax.nn.norm import RMSNorm
from vgjax.sharding import shard
from vgjax.typing import Array, Dtype, Float, Key, Params

SIZES: dict[str, dict[str, Any]] = {
    # 4x4x4 with 12 channels: the quickstart's 17x32x32 clips become 5x8x8.
    "tiny": dict(width=16, multipliers=(1, 2, 2), blocks=1, time=(2, 2), space=(2, 1), patch=2, latent_channels=12),
    # 4x8x8 with 16 channels: real footage from 64x64 on.
    "small": dict(width=32, multipliers=(1, 2, 4), blocks=1, time=(2, 2), space=(2, 2), patch=2, latent_channels=16),
    # The field's compression and width (Wan 2.1: base 96; HunyuanVideo: base 128).
    "4x8x8": dict(width=96, multipliers=(1, 2, 4, 4), blocks=2, time=(1, 2, 2), space=(2, 2, 2), latent_channels=16),
}
LOGVAR = -6.0  # at birth: little noise, so that the first steps see what they encode


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
    padding: Padding = "zeros"
    remat: bool = False
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        levels = len(self.multipliers)
        if len(self.time) != levels - 1 or len(self.space) != levels - 1:
            raise UserError(
                f"a causal VAE of {levels} levels (multipliers {self.multipliers}) needs {levels - 1} strides, "
                f"but time is {self.time} and space is {self.space}"
            )
        channels = tuple(self.width * multiplier for multiplier in self.multipliers)
        shape = (channels, tuple(zip(self.time, self.space, strict=True)), self.blocks)
        rest = dict(padding=self.padding, remat=self.remat, dtype=self.dtype)
        self.encoder = Encoder(*shape, features=2 * self.latent_channels, **rest)
        self.decoder = Decoder(*shape, features=3 * self.patch**2, **rest)
        volume = (self.time_factor, self.space_factor, self.space_factor)
        point = functools.partial(CausalConv3D, kernel=(1, 1, 1), dtype=self.dtype)
        self.fold, self.unfold = CausalFold(*volume[:2]), CausalUnfold(*volume[:2])
        self.project = point(self.latent_channels, init=functools.partial(cosines, volume=volume))
        self.expand = point(3 * math.prod(volume), init=functools.partial(cosines, volume=volume))

    def __call__(self, video: Float[Array, "b t h w 3"]) -> tuple[Array, Array, Array]:
        """`(reconstruction of the mean, mean, logvar)`."""
        mean, logvar = self.encode(video)
        return self.decode(mean), mean, logvar

    def encode(self, video: Float[Array, "b t h w 3"]) -> tuple[Float[Array, "b s i j z"], Float[Array, "b s i j z"]]:
        """Mean and log-variance of the posterior, fp32."""
        self._check(video.shape)
        x = rearrange(video, "b t (h p) (w q) c -> b t h w (p q c)", p=self.patch, q=self.patch)
        mean, logvar = jnp.split(self.encoder(x).astype(jnp.float32), 2, axis=-1)
        mean = mean + self.project(self.fold(video)).astype(jnp.float32)
        return mean, jnp.clip(logvar + LOGVAR, -30.0, 20.0)

    def decode(self, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w 3"]:
        """Video of the latents, fp32."""
        x = self.decoder(z).astype(jnp.float32)
        x = rearrange(x, "b t h w (p q c) -> b t (h p) (w q) c", p=self.patch, q=self.patch)
        return x + self.unfold(self.expand(z)).astype(jnp.float32)

    @property
    def time_factor(self) -> int:
        return math.prod(self.time)

    @property
    def space_factor(self) -> int:
        return self.patch * math.prod(self.space)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """`t h w c` of the latents of one video."""
        self._check((1, frames, height, width, 3), streaming=False)
        small = (1 + (frames - 1) // self.time_factor, height // self.space_factor, width // self.space_factor)
        return (*small, self.latent_channels)

    def _check(self, shape: tuple[int, ...], streaming: bool | None = None) -> None:
        if streaming is None:
            streaming = bool(self.variables.get("cache"))
        _, frames, height, width, _ = shape
        for name, size in (("height", height), ("width", width)):
            if size % self.space_factor or not size:
                near = max(1, round(size / self.space_factor)) * self.space_factor
                raise UserError(
                    f"video {name} {size} is not a multiple of {self.space_factor}, the VAE's down-sampling; "
                    f"the nearest {name} that works is {near}"
                )
        first = 0 if streaming else 1
        if (frames - first) % self.time_factor or not frames:
            near = first + max(0 if first else 1, round((frames - first) / self.time_factor)) * self.time_factor
            rule = f"{self.time_factor}k" if streaming else f"1 + {self.time_factor}k"
            raise UserError(f"{frames} frames are not {rule}; the nearest number of frames that works is {near}")


def cosines(key: Key, shape: tuple[int, ...], dtype: Dtype, volume: tuple[int, int, int]) -> Float[Array, "..."]:
    """Initialiser: the lowest frequencies of the 3-D cosine transform (DCT-II) of a `volume` (t, h, w) of pixels.

    Between pixels in the order of `CausalFold` and latents, the longer of the last two dims the pixels. Scaled so that
    the mean colour of the volume keeps its scale; pixels to latents and back is the best low-pass.
    """
    steps = [np.arange(n) for n in volume]
    waves = [np.cos(np.pi * (x + 0.5) * x[:, None] / len(x)) * np.where(x == 0, 1, 2**0.5)[:, None] for x in steps]
    frequency = sum(axis**2 for axis in np.meshgrid(*(x / len(x) for x in steps), indexing="ij"))
    lowest = np.unravel_index(np.argsort(frequency, axis=None, kind="stable"), volume)
    basis = np.einsum("fr,fp,fq->frpq", *(wave[index] for wave, index in zip(waves, lowest, strict=True)))
    basis = np.einsum("frpq,cd->fdcrpq", basis, np.eye(3)).reshape(3 * len(basis), -1)
    if shape[-2] >= shape[-1]:
        return jnp.asarray(basis[: shape[-1]].T / math.prod(volume), dtype).reshape(shape)
    return jnp.asarray(basis[: shape[-2]], dtype).reshape(shape)


class Pyramid(nn.Module):
    """What encoder and decoder share: `channels` a level, `strides` (time, space) between them, `features` that leave."""

    channels: tuple[int, ...]
    strides: tuple[tuple[int, int], ...]
    blocks: int
    features: int
    padding: Padding = "zeros"
    remat: bool = False
    dtype: Dtype = jnp.float32

    def conv(self, features: int, name: str) -> CausalConv3D:
        return CausalConv3D(features, padding=self.padding, dtype=self.dtype, name=name)

    def residual(self, x: Array, level: int | str, blocks: int) -> Array:
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        for i in range(blocks):
            x = block(x.shape[-1], self.padding, self.dtype, name=f"block_{level}_{i}")(x)
        return x

    def head(self, x: Array) -> Array:
        return CausalConv3D(self.features, padding=self.padding, dtype=self.dtype, name="conv_out",init=nn.initializers.zeros)(nn.silu(RMSNorm(dtype=self.dtype, name="norm_out")(x)))


class Encoder(Pyramid):
    """Blocks of pixels to the posterior's mean and log-variance."""

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j z"]:
        x = self.residual(self.conv(self.channels[0], "conv_in")(x), 0, self.blocks)
        for level, stride in enumerate(self.strides, start=1):
            x = CausalDownsample(self.channels[level], *stride, self.padding, self.dtype, name=f"down_{level}")(x)
            x = self.residual(x, level, self.blocks)
        return self.head(self.residual(x, "mid", 1))


class Decoder(Pyramid):
    """Latents to blocks of pixels; the encoder backwards."""

    @nn.compact
    def __call__(self, z: Float[Array, "b s i j z"]) -> Float[Array, "b t h w c"]:
        x = self.residual(self.conv(self.channels[-1], "conv_in")(z), "mid", 1)
        for level, stride in reversed(list(enumerate(self.strides, start=1))):
            x = self.residual(x, level, self.blocks)
            x = CausalUpsample(self.channels[level - 1], *stride, self.padding, self.dtype, name=f"up_{level}")(x)
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
        x = x + conv(name="conv_2", init=nn.initializers.zeros)(y)
        return shard(x, "batch", None, "height", "width", None)


class LatentStats(NamedTuple):
    """Measured per-channel mean and standard deviation of latents."""

    mean: Float[Array, " c"]
    std: Float[Array, " c"]


def latent_stats(means: Float[Array, "... c"]) -> LatentStats:
    """Per-channel statistics of encoded means over everything but channels, fp32."""
    axes = tuple(range(means.ndim - 1))
    means = means.astype(jnp.float32)
    return LatentStats(jnp.mean(means, axis=axes), jnp.maximum(jnp.std(means, axis=axes), 1e-6))


def to_unit(z: Float[Array, "... c"], stats: LatentStats) -> Float[Array, "... c"]:
    """Latents of zero mean and unit variance per channel, what the diffusion model sees."""
    return (z - stats.mean) / stats.std


def from_unit(z: Float[Array, "... c"], stats: LatentStats) -> Float[Array, "... c"]:
    """The inverse of `to_unit`, what `decode` takes."""
    return z * stats.std + stats.mean


def encode_stream(
    model: CausalVAE, params: Params, video: Float[Array, "b t h w 3"], chunk: int
) -> tuple[Float[Array, "b s i j z"], Float[Array, "b s i j z"]]:
    """`encode`, `chunk` frames at a time (a multiple of `time_factor`; the first chunk has one more)."""
    if chunk < 1 or chunk % model.time_factor:
        near = max(1, round(chunk / model.time_factor)) * model.time_factor
        raise UserError(f"chunk {chunk} is not a multiple of the VAE's {model.time_factor} frames a latent; try {near}")
    model.latent_shape(*video.shape[1:4])
    parts = _stream(model, params, video, chunk, "encode")
    means, logvars = zip(*parts, strict=True)
    return jnp.concatenate(means, axis=1), jnp.concatenate(logvars, axis=1)


def decode_stream(
    model: CausalVAE, params: Params, z: Float[Array, "b s i j z"], chunk: int
) -> Float[Array, "b t h w 3"]:
    """`decode`, `chunk` latent frames at a time (the first chunk has one more)."""
    if chunk < 1:
        raise UserError(f"chunk {chunk}: a stream is decoded by at least 1 latent frame at a time")
    return jnp.concatenate(_stream(model, params, z, chunk, "decode"), axis=1)


def _stream(model: CausalVAE, params: Params, x: Array, chunk: int, method: str) -> list:
    cache, parts = {}, []
    for part in jnp.split(x, list(range(1 + chunk, x.shape[1], chunk)), axis=1):
        out, cache = _apply_chunk(model, method, params, cache, part)
        parts.append(out)
    return parts


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply_chunk(model: CausalVAE, method: str, params: Params, cache: Params, x: Array) -> tuple[Any, Params]:
    out, state = model.apply({"params": params, "cache": cache}, x, method=method, mutable=["cache"])
    return out, state["cache"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(model: CausalVAE, method: str, params: Params, x: Array) -> Any:
    return model.apply({"params": params}, x, method=method)
