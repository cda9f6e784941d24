"""A pipeline: conditioner, stages of models, codec and defaults; the one thing that is sampled.

pipeline = load("runs/quickstart/dit")       # or a converted folder, or a run that was finetuned from one
videos = pipeline(["a red circle moves left"], seed=0, steps=24, cfg=3.0)  # uint8 [n, t, h, w, 3]
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from vgjax.errors import UserError
from vgjax.flow import guidance
from vgjax.flow.path import noise, retimed, seeded, stepper_keys
from vgjax.flow.sampling import Settings
from vgjax.flow.schedule import Schedule
from vgjax.flow.steppers import State, advance, named
from vgjax.nn.codec import check_finite
from vgjax.parallel import sharding
from vgjax.parallel.distributed import fetch
from vgjax.typing import Array, Bool, Float, PyTree, UInt8


class Context(NamedTuple):
    """What velocities are conditioned on, on the host.

    texts and negative (None without guidance): rows of one sample each; given: of an image, the same for all samples.
    """

    texts: PyTree
    negative: PyTree
    given: PyTree


@runtime_checkable
class Conditioner(Protocol):
    """Captions and an image to a Context."""

    def __call__(
        self, prompts: Sequence[str], use: Settings, negative: str | None, image: UInt8[np.ndarray, "h w 3"] | None
    ) -> Context:
        """The Context of prompts, and of a negative one (None: the family's own) where `use` guides."""

    def told_of_cut(self, prompts: Sequence[str]) -> None:
        """A note on stderr of prompts that are longer than the text that is read."""

    def finished(self, z: Float[np.ndarray, "n t h w c"], given: PyTree) -> Float[np.ndarray, "n t h w c"]:
        """The latents with what was given of an image in its place."""


@runtime_checkable
class Codec(Protocol):
    """A VAE on its devices."""

    def latent_shape(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """`t h w c` of a video's latents; a `UserError` for a video that cannot be made."""

    def decode(
        self, z: Float[np.ndarray, "n t h w c"], batch: int, tile: int
    ) -> tuple[UInt8[np.ndarray, "n s i j 3"], Bool[np.ndarray, " n"]]:
        """(pixels of unit-scale latents, which samples are finite), `batch` videos at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A model, the times that it serves and its scale of guidance.

    opened: a context that gives (velocity, variables), where `velocity(variables, texts, guidance, given)` makes a
    Velocity and is hashable; after it the variables may be gone.
    """

    opened: Callable[[], contextlib.AbstractContextManager[tuple[Callable[..., Any], PyTree]]]
    schedule: Schedule
    cfg: float | int


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A model ready to sample: call it with prompts.

    name: of what it is. source: the run or the folder behind it. defaults: of changed options the Settings, or a
    `UserError` for one that has no effect. stages: of Settings and a latent shape. where: (layout, mesh) of its
    parameters, None for one device.
    """

    name: str
    source: Any
    conditioner: Conditioner
    stages: Callable[[Settings, tuple[int, int, int, int]], list[Stage]]
    codec: Codec
    defaults: Callable[..., Settings]
    where: tuple[Any, Any] | None = None

    def __call__(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        negative: str | None = None,
        image: UInt8[np.ndarray, "h w 3"] | None = None,
        **changed: Any,
    ) -> UInt8[np.ndarray, "n t h w 3"]:
        """Videos of `prompts`; sample i's noise depends on `(seed, i)` alone. changed: fields of `Settings`."""
        use = self.defaults(**changed)
        z = self.sampled(prompts, seed, negative, image, **changed)
        check_finite(np.isfinite(z).all(axis=(1, 2, 3, 4)), prompts)
        videos, finite = self.codec.decode(z, min(use.batch, len(z)), use.tile)
        check_finite(finite, prompts)
        return videos

    def sampled(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        negative: str | None = None,
        image: UInt8[np.ndarray, "h w 3"] | None = None,
        first: int = 0,
        **changed: Any,
    ) -> Float[np.ndarray, "n t h w c"]:
        """Unit-scale latents of `prompts`; sample i's noise depends on `(seed, first + i)` alone."""
        use, _ = self.defaults(**changed), seeded(seed)
        self.codec.latent_shape(use.frames, use.size)  # what cannot be made is said before anything runs
        return self.latents(self.condition(prompts, use, negative, image), use, seed, first)

    def condition(
        self,
        prompts: Sequence[str],
        use: Settings,
        negative: str | None = None,
        image: UInt8[np.ndarray, "h w 3"] | None = None,
    ) -> Context:
        """What `latents` takes of prompts and an image."""
        if not prompts:
            raise UserError("no prompts to sample: give --prompt or a --prompts file with one prompt a line")
        if negative and not use.guided:
            raise UserError(
                "--negative has no effect at --cfg 1, which guides away from nothing: give --cfg above 1 (twice the "
                "time), or leave --negative out"
            )
        return self.conditioner(prompts, use, negative, image)

    def latents(
        self,
        context: Context,
        use: Settings,
        seed: int = 0,
        first: int = 0,
        starts: Float[Array, "n t h w c"] | None = None,
    ) -> Float[np.ndarray, "n t h w c"]:
        """Unit-scale latents that noise (or `starts`) becomes, stage by stage, `use.batch` videos at a time."""
        count = len(jax.tree.leaves(context.texts)[0])
        key, index = seeded(seed), first + jnp.arange(count, dtype=jnp.uint32)
        shape = self.codec.latent_shape(use.frames, use.size)
        # On the host: the devices of a layout take nothing that lies on one of them.
        starts = np.asarray(noise(key, index, shape) if starts is None else starts)
        keys = np.asarray(jax.random.key_data(stepper_keys(key, index)))
        context = jax.tree.map(np.asarray, context)
        size = min(use.batch, count)
        # The last row again where the last group is short: one compiled size.
        groups = [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]
        # The stepper goes on from one model to the next, as one scheduler does in the published pipelines.
        each: list[tuple[np.ndarray, State | None]] = [(starts[rows], None) for rows in groups]
        for stage in self.stages(use, shape):
            if len(stage.schedule.times) < 2:
                continue
            texts = [context.texts] if stage.cfg == 1.0 else [context.texts, context.negative]
            with self.here(), stage.opened() as (velocity, variables):
                for i, (rows, (x, state)) in enumerate(zip(groups, each, strict=True)):
                    both = jax.tree.map(lambda *a, rows=rows: np.concatenate([one[rows] for one in a]), *texts)
                    told = stage.schedule.times, stage.schedule.told
                    inputs = variables, both, context.given, x, keys[rows], state, *told
                    each[i] = fetch(follow(velocity, use, stage.cfg, *inputs))
        z = np.concatenate([x for x, _ in each])[:count]
        return self.conditioner.finished(z, context.given)

    def here(self) -> contextlib.AbstractContextManager:
        """Makes the layout the active one."""
        return sharding.use(*self.where) if self.where else contextlib.nullcontext()


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def follow(
    velocity: Callable[..., Any],
    use: Settings,
    cfg: float | int,
    variables: PyTree,
    texts: PyTree,
    given: PyTree,
    x: Array,
    keys: Array,
    state: State | None,
    times: Array,
    told: Array | None,
) -> tuple[Array, State]:
    """`x` from the first to the last of `times`, where the model is told `told` (None: the times), and the stepper's
    state there.

    With guidance the texts are doubled, the prompts first. keys: their data, one a sample; state: None at the start.
    """
    v = velocity(variables, texts, use.guidance, given)
    v = v if told is None else retimed(v, times, told)
    v = guidance.cfg(v, cfg, use.interval, use.rescale) if cfg != 1.0 else v
    stepper, x = named(use.stepper), x.astype(jnp.float32)
    # What one model remembers means nothing to the next.
    state = stepper.init(x, jax.random.wrap_key_data(keys)) if state is None else state._replace(memory=None)
    return advance(stepper, v, x, times, state)
