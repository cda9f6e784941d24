"""What every video codec does: the sizes it takes, the scale of its latents, streams and tiles of it.

A codec is a module with `encode`, `decode`, `time_factor`, `space_factor` and `latent_shape`, and, of its parameters,
`encode_video` (mean latents of bytes, `rows` clips at a time) and `decode_video`: a video of any length in
the pieces that its model is made for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vgjax.errors import Diverged, UserError
from vgjax.typing import Array, Bool, Float, Params, PyTree, UInt8


def check_video(
    frames: int, height: int, width: int, time_factor: int, space_factor: int, streaming: bool = False
) -> None:
    """A `UserError`, with the nearest size that works, where a codec of these factors cannot encode such a video.

    A video has `1 + time_factor * k` frames, one that continues a stream `time_factor * k`.
    """
    for name, size in (("height", height), ("width", width)):
        if size % space_factor or not size:
            near = max(1, round(size / space_factor)) * space_factor
            raise UserError(
                f"video {name} {size} is not a multiple of {space_factor}, the VAE's down-sampling; "
                f"the nearest {name} that works is {near}"
            )
    first, least = (0, 1) if streaming else (1, 0)
    if (frames - first) % time_factor or not frames:
        near = first + max(least, round((frames - first) / time_factor)) * time_factor
        rule = f"{time_factor}k" if streaming else f"1 + {time_factor}k"
        raise UserError(f"{frames} frames are not {rule}; the nearest number of frames that works is {near}")


def latent_shape(
    video: tuple[int, int, int], time_factor: int, space_factor: int, channels: int
) -> tuple[int, int, int, int]:
    """`t h w c` of the latents of one video of frames, height and width; a `UserError` as of `check_video`."""
    frames, height, width = video
    check_video(*video, time_factor, space_factor)
    return 1 + (frames - 1) // time_factor, height // space_factor, width // space_factor, channels


def check_finite(finite: Bool[np.ndarray, " n"], prompts: Sequence[str]) -> None:
    """`Diverged`, naming the samples that are not `finite`."""
    wrong = [prompt for prompt, good in zip(prompts, finite, strict=True) if not good]
    if wrong:
        named = ", ".join(map(repr, dict.fromkeys(wrong[:3])))
        raise Diverged(
            f"{len(wrong)} of {len(finite)} samples hold numbers that are not finite ({named}): change cfg, shift or "
            "the stepper, compute in float32, or take another checkpoint"
        )


def from_uint8(video: UInt8[Array, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
    """Bytes to floats in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: Float[Array, "b t h w 3"]) -> UInt8[Array, "b t h w 3"]:
    """Floats in [-1, 1], clipped, to bytes; on the device, so that the host copies a quarter."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)


class LatentStats(NamedTuple):
    """Per-channel mean and standard deviation of latents."""

    mean: Float[Array, " c"]
    std: Float[Array, " c"]


def stats_of(rows: Sequence[Sequence[float]]) -> LatentStats:
    """The statistics that a checkpoint's meta holds as lists."""
    return LatentStats(*(jnp.asarray(row, jnp.float32) for row in rows))


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


@functools.partial(jax.jit, static_argnums=0)
def encode_mean(model: nn.Module, params: Params, clips: UInt8[Array, "b t h w 3"]) -> Float[Array, "b s i j z"]:
    """Mean latents of clips, all their frames at once."""
    return model.apply({"params": params}, from_uint8(clips), method="encode")[0]


def encode_stream(
    model: nn.Module, params: Params, video: Float[Array, "b t h w 3"], chunk: int
) -> tuple[Float[Array, "b s i j z"], Float[Array, "b s i j z"]]:
    """`encode`, `chunk` frames at a time (a multiple of `time_factor`; the first chunk has one more)."""
    if chunk < 1 or chunk % model.time_factor:
        near = max(1, round(chunk / model.time_factor)) * model.time_factor
        raise UserError(f"chunk {chunk} is not a multiple of the VAE's {model.time_factor} frames a latent; try {near}")
    model.latent_shape(*video.shape[1:4])
    means, logvars = zip(*_stream(model, "encode", params, video, chunk), strict=True)
    return jnp.concatenate(means, axis=1), jnp.concatenate(logvars, axis=1)


def decode_stream(
    model: nn.Module, params: Params, z: Float[Array, "b s i j z"], chunk: int
) -> Float[Array, "b t h w 3"]:
    """`decode`, `chunk` latent frames at a time (the first chunk has one more)."""
    if chunk < 1:
        raise UserError(f"chunk {chunk}: a stream is decoded by at least 1 latent frame at a time")
    return jnp.concatenate(_stream(model, "decode", params, z, chunk), axis=1)


def _stream(model: nn.Module, method: str, params: Params, x: Array, chunk: int) -> list[PyTree]:
    cache, outs = {}, []
    for part in jnp.split(x, list(range(1 + chunk, x.shape[1], chunk)), axis=1):
        out, cache = run(model, method, params, cache, part)
        outs.append(out)
    return outs


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(model: nn.Module, method: str, params: Params, cache: Params, x: Array) -> tuple[PyTree, Params]:
    """(what a method says of `x`, the cache after it); an empty cache starts a stream."""
    out, state = model.apply({"params": params, "cache": cache}, x, method=method, mutable=["cache"])
    return out, state["cache"]


def encode_tiled(
    model: nn.Module, params: Params, video: Float[Array, "b t h w 3"], tile: int, overlap: int
) -> tuple[Float[Array, "b s i j z"], Float[Array, "b s i j z"]]:
    """`encode` in overlapping square tiles; `tile` and `overlap` in latent positions."""
    model.latent_shape(*video.shape[1:4])

    def encode(part: Array) -> Array:
        return jnp.concatenate(run(model, "encode", params, {}, part)[0], axis=-1)

    out = _tiled(encode, video, tile, overlap, model.space_factor, 1)
    mean, logvar = jnp.split(out, 2, axis=-1)
    return mean, logvar


def decode_tiled(
    model: nn.Module,
    params: Params,
    z: Float[Array, "b s i j z"],
    tile: int,
    overlap: int,
    fetch: Callable[[Array], np.ndarray] = np.asarray,
) -> Float[Array, "b t h w 3"]:
    """`decode_video` in overlapping square tiles; `tile` and `overlap` in latent positions.

    fetch: brings the frames of a tile to the host, for what is spread over several processes.
    """

    def one(part: Array) -> np.ndarray:
        return fetch(model.decode_video(params, part))

    return _tiled(one, z, tile, overlap, 1, model.space_factor)


def _tiled(function: Callable[[Array], Array], x: Array, tile: int, overlap: int, before: int, after: int) -> Array:
    """`function` on tiles, blended on the host; a latent position is `before` pixels of `x` and `after` of the result.

    Of each overlap the outer quarters are context and only the middle half is blended, so that where a quarter covers
    the receptive field the result is that of the whole.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"tiles of {tile} latent positions cannot overlap by {overlap}; try {tile // 2}")
    spans = [_spans(size // before, tile, overlap) for size in x.shape[2:4]]
    total = weight = None
    for top, bottom in spans[0]:
        for left, right in spans[1]:
            out = np.asarray(function(x[:, :, top * before : bottom * before, left * before : right * before]))
            if total is None:
                height, width = (size // before * after for size in x.shape[2:4])
                total = np.zeros((*out.shape[:2], height, width, out.shape[-1]), np.float32)
                weight = np.zeros((height, width, 1), np.float32)
            rows = _ramp(top, bottom, spans[0][-1][1], overlap, after)
            window = (rows[:, None] * _ramp(left, right, spans[1][-1][1], overlap, after))[..., None]
            here = (slice(top * after, bottom * after), slice(left * after, right * after))
            total[:, :, *here] += window * out
            weight[here] += window
    return jnp.asarray(total / weight)


def _spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """Tiles of one size that cover `size`; the last one ends where it ends."""
    tile = min(tile, size)
    starts = [*range(0, size - tile, max(1, tile - overlap)), size - tile]
    return [(start, start + tile) for start in starts]


def _ramp(start: int, stop: int, size: int, overlap: int, scale: int) -> np.ndarray:
    """Weights along one dim of a tile: 1, falling to 0 in the overlap with a neighbour, not at the picture's border."""
    if not overlap:
        return np.ones((stop - start) * scale, np.float32)
    position = np.arange((stop - start) * scale, dtype=np.float32) + 0.5
    inner = (overlap * scale / 4, overlap * scale / 2)
    rise = np.clip((position - inner[0]) / inner[1], 0, 1) if start else 1.0
    fall = np.clip((position[::-1] - inner[0]) / inner[1], 0, 1) if stop < size else 1.0
    return np.ones_like(position) * rise * fall
