"""The pipeline of a converted folder: each model comes onto the devices, does its part, and goes again."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgjax.errors import UserError
from vgjax.flow.sampling import Settings
from vgjax.flow.steppers import Velocity
from vgjax.nn.codec import decode_tiled, from_unit, stats_of
from vgjax.open.families import family_of
from vgjax.open.store import Store
from vgjax.open.texts import embed
from vgjax.parallel.distributed import fetch
from vgjax.pipeline.pipeline import Context, Pipeline, Stage
from vgjax.pipeline.trained import pixels
from vgjax.typing import Array, Bool, Float, PyTree, UInt8


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The text encoders of a folder, and what its models take of an image."""

    store: Store
    family: Any

    def __call__(
        self, prompts: Sequence[str], use: Settings, negative: str | None, image: UInt8[np.ndarray, "h w 3"] | None
    ) -> Context:
        other = [self.family.NEGATIVE if negative is None else negative] * (len(prompts) if use.guided else 0)
        given = self.family.condition(self.store, image, use.frames, use.size)
        both, n = embed(self.store, self.family, [*prompts, *other]), len(prompts)
        rest = jax.tree.map(lambda x: x[n:], both) if use.guided else None
        return Context(jax.tree.map(lambda x: x[:n], both), rest, given)

    def told_of_cut(self, prompts: Sequence[str]) -> None:
        """Nothing: it is said when they are read."""

    def finished(self, z: Float[np.ndarray, "n t h w c"], given: PyTree) -> Float[np.ndarray, "n t h w c"]:
        return np.asarray(self.family.finished(jnp.asarray(z), given))


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The VAE of a folder, on the devices while it decodes, and the patches that its transformer asks for."""

    store: Store
    family: Any

    def latent_shape(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        vae, model = (self.store.module(self.store.published(name), name) for name in ("vae", "transformer"))
        height, width = units = [vae.space_factor * patch for patch in model.patch[1:]]
        if any(side < unit or side % unit for side, unit in zip(size, units, strict=True)):
            near = (max(unit, unit * round(side / unit)) for side, unit in zip(size, units, strict=True))
            raise UserError(
                f"a video of {'x'.join(map(str, size))} pixels (height x width) does not divide into patches of "
                f"{height}x{width} pixels; the nearest that does is {'x'.join(map(str, near))}"
            )
        shape = vae.latent_shape(frames, *size)
        model.tokens(shape[:3])
        return shape

    def decode(
        self, z: Float[np.ndarray, "n t h w c"], batch: int, tile: int
    ) -> tuple[UInt8[np.ndarray, "n s i j 3"], Bool[np.ndarray, " n"]]:
        videos, finite = zip(*(fetch(jax.jit(pixels)(one)) for one in self._frames(z, batch, tile)), strict=True)
        return np.concatenate(videos), np.concatenate(finite)

    def frames(self, z: Float[np.ndarray, "n t h w c"], tile: int = 0) -> Float[np.ndarray, "n s i j 3"]:
        """Frames in about [-1, 1], one video at a time, as published or in tiles of `tile` latent positions a side."""
        return np.concatenate([fetch(one) for one in self._frames(z, 1, tile)])

    def _frames(self, z: np.ndarray, batch: int, tile: int) -> Iterator[Array]:
        with self.store.here(), self.store.model("vae") as (vae, params, meta):
            scaled = np.asarray(from_unit(jnp.asarray(z), stats_of(meta["stats"])))
            for i in range(0, len(z), batch):
                some = self.store.put(scaled[i : i + batch])
                if tile and tile < max(some.shape[2:4]):
                    yield decode_tiled(vae, params, some, tile, tile // 4, self.family.decode, fetch)
                else:
                    yield self.family.decode(vae, params, some)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The velocity of a family's model, as stages make it."""

    velocity: Callable[..., Velocity]
    model: Any

    def __call__(self, variables: PyTree, texts: PyTree, guidance: float | int, given: PyTree) -> Velocity:
        return self.velocity(self.model, variables, texts, guidance, given)


def pipeline(store: Store) -> Pipeline:
    """The pipeline of a converted folder, as published, with what a run made of one of its models if it says so.

    The defaults of such a run are those of its config.
    """
    family = family_of(store)

    @contextlib.contextmanager
    def opened(name: str) -> Iterator[tuple[Bound, PyTree]]:
        with store.variables(name) as (model, variables):
            yield Bound(family.velocity, model), variables

    def stages(use: Settings, shape: tuple[int, int, int, int]) -> list[Stage]:
        found = family.stages(store, use)
        return [Stage(functools.partial(opened, one.name), one.schedule, one.cfg) for one in found]

    defaults = functools.partial(family.settings, store, **(store.tuned.sample if store.tuned else {}))
    name = str(store.index["_class_name"]) + (f" of {store.tuned.run}" if store.tuned else "")
    return Pipeline(name, store, Encoders(store, family), stages, Decoder(store, family), defaults, store.where)
