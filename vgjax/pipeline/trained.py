"""The pipeline of a text-to-video model that was trained here."""

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from vgjax import experiment
from vgjax.errors import UserError
from vgjax.flow.known import beginning
from vgjax.flow.sampling import Settings
from vgjax.flow.schedule import Schedule
from vgjax.flow.steppers import Velocity
from vgjax.flow.time import Shift
from vgjax.nn.codec import LatentStats
from vgjax.parallel import layouts, sharding
from vgjax.parallel.layouts import Placement
from vgjax.pipeline.codec import Codec
from vgjax.pipeline.frozen import frozen_vae
from vgjax.pipeline.pipeline import Pipeline, Prompts, Stage
from vgjax.training import checkpoint
from vgjax.typing import Context, Json, Module, Objective, Params, PyTree, UInt8

FPS = 24.0  # of samples of a model that was trained on clips at their own rates


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What was read of a training: the experiment, the parameters that are sampled, what is frozen; at which step."""

    experiment: experiment.Experiment
    params: Params
    frozen: PyTree
    step: int = 0


def codec_of(vae: Module, frozen: PyTree, where: Placement | None = None, model: Module | None = None) -> Codec:
    """A frozen VAE, whole on each device of a placement or on one, and the patches that `model` asks of it."""
    held = functools.partial(contextlib.nullcontext, frozen["vae"])
    return Codec(vae, held, frozen["stats"], functools.partial(checkpoint.digest, frozen), model, where)


def vae_of(path: str | Path, weights: str = "ema", where: Placement | None = None) -> Codec:
    """The VAE of its own training, whose latents are taken as they are; `weights` is `ema` or `params`."""
    tree, meta, _ = checkpoint.load(
        path, items=(weights,), place=lambda _, stored: {weights: sharding.abstract(stored[weights], where)}
    )
    built = experiment.build(ConfigDict(meta["config"]))
    checkpoint.check_leaves(tree[weights], sharding.unboxed(wanted(built)), path)
    return codec_of(built.vae, {"vae": tree[weights]["vae"], "stats": unscaled(built.vae)}, where)


def unscaled(vae: Module) -> LatentStats:
    """Statistics that leave latents as they are."""
    return LatentStats(jnp.zeros(vae.latent_channels), jnp.ones(vae.latent_channels))


def text_alone(image: UInt8[np.ndarray, "h w 3"] | None, frames: int, size: tuple[int, int]) -> Context:
    """What a text-to-video model takes of an image."""
    if image is not None:
        raise UserError("--image: this model makes videos of text alone")
    return Context({})


def first_frame(codec: Codec, image: UInt8[np.ndarray, "h w 3"] | None, frames: int, size: tuple[int, int]) -> Context:
    """What a model that may be given its first frames takes of an image: scaled to cover `size`, its middle."""
    if image is None:
        return Context({})
    fitted = ImageOps.fit(Image.fromarray(image), size[::-1], Image.Resampling.BICUBIC)
    z = codec.encode(np.asarray(fitted)[None, None])
    return Context({}, known=beginning(z, codec.latent_shape(frames, size)[0]))


@dataclasses.dataclass(frozen=True)
class Bound:
    """The velocity of an objective, as stages make it."""

    objective: Objective

    def __call__(self, params: Params, context: Context) -> Velocity:
        return self.objective.bind(params, context)


def pipeline(run: Run, where: Placement | None = None) -> Pipeline:
    """The pipeline of a run, whose parameters lie on `where`."""
    config, objective = run.experiment.config, run.experiment.objective
    settings = settings_of(config)

    def defaults(**changed: Any) -> Settings:
        if "guidance" in changed and not objective.model.guidance:
            raise UserError("--guidance has no effect: the model is not guidance-distilled; give --cfg instead")
        return dataclasses.replace(settings, **changed)

    def stages(use: Settings, shape: tuple[int, int, int, int]) -> list[Stage]:
        if len(use.cfg) != 1:
            raise UserError(f"cfg={use.cfg}: one model is sampled, which takes one scale")
        opened = functools.partial(contextlib.nullcontext, (Bound(objective), run.params))
        return [Stage(opened, schedule_of(objective, use, shape), use.cfg[0])]

    codec = codec_of(objective.codec, run.frozen, where, objective.model)
    seen = functools.partial(first_frame, codec) if objective.known else text_alone
    prompts = Prompts(run.experiment.conditioner.placed(where), "", seen, objective.model.guidance)
    return Pipeline(f"{config.model.kind}, step {run.step}", run, prompts, stages, codec, defaults, where)


def schedule_of(objective: Objective, use: Settings, shape: tuple[int, int, int, int]) -> Schedule:
    """Evenly spaced times, moved by the shift for so many tokens."""
    shift = dataclasses.replace(objective.shift, factor=use.shift)
    times = shift(jnp.linspace(0.0, 1.0, use.steps + 1), objective.tokens(shape[:3]))
    return Schedule(np.asarray(times, np.float32), None)


def settings_of(config: ConfigDict) -> Settings:
    """The sampling defaults of a flow config; its training shift is also the sampling shift unless said otherwise."""
    data, shift = config.data, config.shift.get("factor", Shift().factor)
    fps = FPS if data.get("fps") is None else data.fps
    video = dict(frames=data.frames, size=tuple(data.size), fps=fps)
    return experiment.call("config.sample", Settings, {"shift": shift, **config.sample}, **video)


def load(path: str | Path, weights: str = "ema", layout: str = "", devices: int = 0) -> Pipeline:
    """The pipeline of a training workdir, its checkpoints or one step; `weights` is `ema` or `params`.

    It samples on one device, or on the first `devices` (0: all) by the `layout` of this name. Several processes sample
    together, on all devices, by the layout of the training if they are given none; each returns all videos. Parameters
    are read straight to where they belong: none is ever whole on a device that holds a part of it.
    """
    alone = not layout and jax.process_count() == 1
    parts: Json = {}

    def place(meta: Json, tree: PyTree) -> PyTree:
        config = ConfigDict(meta["config"])
        if config.objective.kind != "flow":
            raise UserError(
                f"{path} holds a {config.objective.kind}, not a text-to-video model: give the workdir of a flow"
            )
        config.layout.kind = layout or config.layout.kind
        where = None if alone else layouts.find(config.layout.kind, devices)
        of_vae, frozen = frozen_vae(checkpoint.workdir_of(path) / "vae", where)
        built = experiment.build(config, of_vae)
        needed = wanted(built)
        checkpoint.check_leaves(tree[weights], sharding.unboxed(needed), path)
        parts.update(experiment=built, frozen=frozen, where=where)
        return {weights: sharding.abstract(needed, where)}

    tree, _, step = checkpoint.load(path, items=(weights,), place=place)
    return pipeline(Run(parts["experiment"], tree[weights], parts["frozen"], step), parts["where"])


def wanted(built: experiment.Experiment) -> PyTree:
    """The abstract parameters of an experiment, in their boxes of names."""
    data, objective = built.config.data, built.objective
    if not objective.of_latents:
        clip = {"video": jax.ShapeDtypeStruct((1, data.frames, *data.size, 3), jnp.uint8)}
        return jax.eval_shape(lambda batch: objective.init(jax.random.key(0), objective.prepare({}, batch)), clip)
    shape = built.vae.latent_shape(data.frames, *data.size)
    # Abstract, so that nothing runs on devices which may be absent.
    batch = {"context": built.conditioner.abstract(1), "x": jax.ShapeDtypeStruct((1, *shape), jnp.float32)}
    return jax.eval_shape(lambda batch: objective.init(jax.random.key(0), batch), batch)
