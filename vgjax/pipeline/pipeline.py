"""A pipeline: what reads prompts, stages of models, codec and defaults; the one thing that is sampled.

pipeline = load("runs/quickstart/dit")       # or a converted folder, or a run that was finetuned from one
videos = pipeline(["a red circle moves left"], seed=0, steps=24, cfg=3.0)  # uint8 [n, t, h, w, 3]
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgjax.errors import UserError
from vgjax.flow import guidance
from vgjax.flow.path import noise, retimed, seeded, stepper_keys
from vgjax.flow.sampling import Settings
from vgjax.flow.schedule import Schedule
from vgjax.flow.steppers import State, Velocity, advance, named
from vgjax.nn.codec import check_finite
from vgjax.parallel import sharding
from vgjax.parallel.distributed import fetch
from vgjax.parallel.layouts import Placement
from vgjax.pipeline.codec import Codec
from vgjax.typing import Array, Conditioner, Context, Float, PyTree, UInt8


class Contexts(NamedTuple):
    """What samples are guided towards, and away from (None without guidance): rows on the host."""

    context: Context
    negative: Context | None


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts and an image to Contexts.

    negative: what is guided away from unless something else is said. image: of an image or None, frames and a size,
    what a model takes of it: a Context of one row. tells: whether the model is told the scale of guidance.
    """

    conditioner: Conditioner
    negative: str
    image: Callable[[UInt8[np.ndarray, "_h _w 3"] | None, int, tuple[int, int]], Context]
    tells: bool

    def __call__(
        self, prompts: Sequence[str], use: Settings, negative: str | None, image: UInt8[np.ndarray, "_h _w 3"] | None
    ) -> Contexts:
        """The Context of prompts, and that of a negative one where `use` guides."""
        n, seen = len(prompts), self.image(image, use.frames, use.size)
        seen = jax.tree.map(lambda row: np.repeat(np.asarray(row), n, axis=0), seen)
        scalars = {"guidance": np.full(n, use.guidance, np.float32)} if self.tells else {}
        other = [self.negative if negative is None else negative] * (n if use.guided else 0)
        both = self.conditioner([*prompts, *other])

        def rows(these: slice) -> Context:
            text = jax.tree.map(lambda leaf: leaf[these], both)
            return seen._replace(text={**text.text, **seen.text}, vec=text.vec, scalars=scalars)

        return Contexts(rows(slice(n)), rows(slice(n, None)) if use.guided else None)


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A model, the times that it serves and its scale of guidance.

    opened: a context that gives (velocity, variables), where `velocity(variables, context)` makes a Velocity and is
    hashable; after it the variables may be gone.
    """

    opened: Callable[[], contextlib.AbstractContextManager[tuple[Callable[..., Velocity], PyTree]]]
    schedule: Schedule
    cfg: float | int


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A model ready to sample: call it with prompts.

    name: of what it is. source: the run or the folder behind it. defaults: of changed options the Settings, or a
    `UserError` for one that has no effect. prompts: to Contexts. stages: of Settings and a latent shape. where:
    a placement of its parameters, None for one device.
    """

    name: str
    source: object
    prompts: Prompts
    stages: Callable[[Settings, tuple[int, int, int, int]], list[Stage]]
    codec: Codec
    defaults: Callable[..., Settings]
    where: Placement | None = None

    def __call__(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        negative: str | None = None,
        image: UInt8[np.ndarray, "_h _w 3"] | None = None,
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
        image: UInt8[np.ndarray, "_h _w 3"] | None = None,
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
        image: UInt8[np.ndarray, "_h _w 3"] | None = None,
    ) -> Contexts:
        """What `latents` takes of prompts and an image."""
        if not prompts:
            raise UserError("no prompts to sample: give --prompt or a --prompts file with one prompt a line")
        if negative and not use.guided:
            raise UserError(
                "--negative has no effect at --cfg 1, which guides away from nothing: give --cfg above 1 (twice the "
                "time), or leave --negative out"
            )
        return self.prompts(prompts, use, negative, image)

    def latents(
        self,
        contexts: Contexts,
        use: Settings,
        seed: int = 0,
        first: int = 0,
        starts: Float[Array, "n t h w c"] | None = None,
    ) -> Float[np.ndarray, "n t h w c"]:
        """Unit-scale latents that noise (or `starts`) becomes, stage by stage, `use.batch` videos at a time."""
        count = len(jax.tree.leaves(contexts.context)[0])
        key, index = seeded(seed), first + jnp.arange(count, dtype=jnp.uint32)
        shape = self.codec.latent_shape(use.frames, use.size)
        # On the host: the devices of a layout take nothing that lies on one of them.
        starts = np.asarray(noise(key, index, shape) if starts is None else starts)
        keys = np.asarray(jax.random.key_data(stepper_keys(key, index)))
        contexts = jax.tree.map(np.asarray, contexts)
        size = min(use.batch, count)
        # The last row again where the last group is short: one compiled size.
        groups = [np.minimum(np.arange(i, i + size), count - 1) for i in range(0, count, size)]
        # The stepper goes on from one model to the next, as one scheduler does in the published pipelines.
        each: list[tuple[np.ndarray, State | None]] = [(starts[rows], None) for rows in groups]
        for stage in self.stages(use, shape):
            if len(stage.schedule.times) < 2:
                continue
            sides = [contexts.context] if stage.cfg == 1.0 else list(contexts)
            with sharding.within(self.where), stage.opened() as (velocity, variables):
                for i, (rows, (x, state)) in enumerate(zip(groups, each, strict=True)):
                    both = jax.tree.map(lambda *a, rows=rows: np.concatenate([one[rows] for one in a]), *sides)
                    told = stage.schedule.times, stage.schedule.told
                    inputs = variables, both, x, keys[rows], state, *told
                    each[i] = fetch(follow(velocity, use, stage.cfg, *inputs))
        z = np.concatenate([x for x, _ in each])[:count]
        known = contexts.context.known
        return z if known is None else np.where(known.mask > 0, known.latents, z)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def follow(
    velocity: Callable[..., Velocity],
    use: Settings,
    cfg: float | int,
    variables: PyTree,
    context: Context,
    x: Array,
    keys: Array,
    state: State | None,
    times: Array,
    told: Array | None,
) -> tuple[Array, State]:
    """`x` from the first to the last of `times`, where the model is told `told` (None: the times), and the stepper's
    state there.

    With guidance the context is doubled, that of the prompts first. keys: their data, one a sample; state: None at the
    start.
    """
    v = velocity(variables, context)
    v = v if told is None else retimed(v, times, told)
    v = guidance.cfg(v, cfg, use.interval, use.rescale) if cfg != 1.0 else v
    stepper, x = named(use.stepper), x.astype(jnp.float32)
    # What one model remembers means nothing to the next.
    state = stepper.init(x, jax.random.wrap_key_data(keys)) if state is None else state._replace(memory=None)
    return advance(stepper, v, x, times, state)
