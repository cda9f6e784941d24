"""A VAE on its devices: videos to latents and back, for whoever encodes, samples or measures."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from vgjax.errors import UserError
from vgjax.nn.codec import LatentStats, decode_tiled, from_unit, to_uint8, to_unit
from vgjax.open.texts import padded
from vgjax.parallel import distributed, sharding
from vgjax.parallel.layouts import Placement
from vgjax.typing import Array, Bool, Float, Module, Params, UInt8

CLIP_BYTES = 2**28  # of the clips (fp32) that are encoded at a time on a device
Encode = Callable[[np.ndarray], np.ndarray]  # uint8 clips to mean latents, fp32


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """A VAE, and the patches that a transformer asks of its latents (None: nobody asks).

    held: a context that gives the parameters; after it they may be gone. stats: of its latents. identity: of all that
    its latents depend on. overlap: neighbouring tiles share one part in so many. where: a placement, None for one
    device.
    """

    vae: Module | None
    held: Callable[[], contextlib.AbstractContextManager[Params]]
    stats: LatentStats
    identity: Callable[[], str]
    model: Module | None = None
    where: Placement | None = None
    overlap: int = 2

    def latent_shape(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """`t h w c` of a video's latents; a `UserError` for a video that cannot be made."""
        if self.model is None:
            return self.vae.latent_shape(frames, *size)
        height, width = units = [self.vae.space_factor * patch for patch in self.model.patch[1:]]
        if any(side < unit or side % unit for side, unit in zip(size, units, strict=True)):
            near = (max(unit, unit * round(side / unit)) for side, unit in zip(size, units, strict=True))
            raise UserError(
                f"a video of {'x'.join(map(str, size))} pixels (height x width) does not divide into patches of "
                f"{height}x{width} pixels; the nearest that does is {'x'.join(map(str, near))}"
            )
        shape = self.vae.latent_shape(frames, *size)
        self.model.tokens(shape[:3])
        return shape

    @contextlib.contextmanager
    def encoder(self, frames: int, size: tuple[int, int]) -> Iterator[tuple[int, Encode]]:
        """(clips at a time, function): as many as fit `CLIP_BYTES`, at most the VAE's `rows`, at least one a device."""
        with sharding.within(self.where), self.held() as params:
            degree = sharding.degree("batch") if self.where else 1
            fit = max(1, CLIP_BYTES // (4 * 3 * frames * math.prod(size)))
            batch = max(degree, min(self.vae.rows, fit * degree) // degree * degree)
            params = sharding.whole(params, self.where)

            def encode(clips: np.ndarray) -> np.ndarray:
                rows = padded(clips, batch)
                rows = sharding.place(rows, *self.where) if self.where else rows
                mean = self.vae.encode_video(params, jnp.asarray(rows))
                return distributed.fetch(mean).astype(np.float32)[: len(clips)]

            yield batch, encode

    def encode(self, clips: UInt8[np.ndarray, "n s i j 3"]) -> Float[np.ndarray, "n t h w c"]:
        """Unit-scale latents of clips."""
        with self.encoder(clips.shape[1], clips.shape[2:4]) as (batch, encode):
            parts = [encode(clips[i : i + batch]) for i in range(0, len(clips), batch)]
        return np.asarray(to_unit(jnp.asarray(np.concatenate(parts)), self.local()))

    def decode(
        self, z: Float[np.ndarray, "n t h w c"], batch: int, tile: int = 0
    ) -> tuple[UInt8[np.ndarray, "n s i j 3"], Bool[np.ndarray, " n"]]:
        """(pixels of unit-scale latents, which samples are finite), `batch` videos at a time.

        tile: decode in tiles of so many latent positions a side, 0: whole.
        """
        videos, finite = zip(*(distributed.fetch(pixels(one)) for one in self._frames(z, batch, tile)), strict=True)
        return np.concatenate(videos), np.concatenate(finite)

    def frames(self, z: Float[np.ndarray, "n t h w c"], tile: int = 0) -> Float[np.ndarray, "n s i j 3"]:
        """Frames in about [-1, 1], one video at a time."""
        return np.concatenate([distributed.fetch(one) for one in self._frames(z, 1, tile)])

    def _frames(self, z: np.ndarray, batch: int, tile: int) -> Iterator[Array]:
        scaled = np.asarray(from_unit(jnp.asarray(z), self.local()))
        with sharding.within(self.where), self.held() as params:
            for i in range(0, len(z), batch):
                some = sharding.whole(scaled[i : i + batch], self.where)
                if tile and tile < max(some.shape[2:4]):
                    overlap = tile // self.overlap
                    yield decode_tiled(self.vae, params, some, tile, overlap, fetch=distributed.fetch)
                else:
                    yield self.vae.decode_video(params, some)

    def local(self) -> LatentStats:
        """The statistics, where this process computes alone."""
        return LatentStats(*map(jnp.asarray, distributed.fetch(self.stats)))


@jax.jit
def pixels(frames: Float[Array, "b t h w 3"]) -> tuple[UInt8[Array, "b t h w 3"], Bool[Array, " b"]]:
    """(bytes, which videos are finite), on the device: a quarter to copy."""
    return to_uint8(frames), jnp.isfinite(frames).all(axis=(1, 2, 3, 4))
