"""The pipeline of a converted folder: each model comes onto the devices, does its part, and goes again."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

from vgjax.flow.sampling import Settings
from vgjax.flow.steppers import Velocity
from vgjax.nn.codec import stats_of
from vgjax.open.families import family_of
from vgjax.open.store import Store
from vgjax.open.texts import identity
from vgjax.pipeline.codec import Codec
from vgjax.pipeline.pipeline import Pipeline, Prompts, Stage
from vgjax.typing import Config, Context, Module, Params, PyTree


def codec_of(store: Store) -> Codec:
    """The VAE of a folder, on the devices while it is used."""
    meta = store.meta("vae")
    vae, where = store.module(meta["published"], "vae"), store.where

    @contextlib.contextmanager
    def held() -> Iterator[Params]:
        with store.model("vae") as (_, params, _):
            yield params

    model = store.module(store.published("transformer"), "transformer") if store.has("transformer") else None
    return Codec(vae, held, stats_of(meta["stats"]), functools.partial(identity, store, "vae"), model, where, 4)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The velocity of a family's model, as stages make it."""

    velocity: Callable[..., Velocity]
    model: Module

    def __call__(self, variables: PyTree, context: Context) -> Velocity:
        return self.velocity(self.model, variables, context)


def pipeline(
    store: Store, live: Mapping[str, tuple[Module, PyTree]] | None = None, sample: Config | None = None
) -> Pipeline:
    """The pipeline of a converted folder, as published, with what a run made of one of its models if it says so.

    live: of models by name, (module, variables) that are on the devices already and stay there. sample: defaults other
    than those published; of a run those of its config.
    """
    family = family_of(store)
    sample = sample or (store.tuned.sample if store.tuned else {})

    @contextlib.contextmanager
    def opened(name: str) -> Iterator[tuple[Bound, PyTree]]:
        if live and name in live:
            model, variables = live[name]
            yield Bound(family.velocity, model), variables
            return
        with store.variables(name) as (model, variables):
            yield Bound(family.velocity, model), variables

    def stages(use: Settings, shape: tuple[int, int, int, int]) -> list[Stage]:
        found = family.stages(store, use)
        return [Stage(functools.partial(opened, one.name), one.schedule, one.cfg) for one in found]

    defaults = functools.partial(family.settings, store, **sample)
    name = str(store.index["_class_name"]) + (f" of {store.tuned.run}" if store.tuned else "")
    codec, image = codec_of(store), functools.partial(family.condition, store)
    prompts = Prompts(family.conditioner(store), family.NEGATIVE, image, codec.model.guidance)
    return Pipeline(name, store, prompts, stages, codec, defaults, store.where)
