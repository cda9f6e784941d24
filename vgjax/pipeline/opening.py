"""From a path to a Pipeline, by what lies there."""

import dataclasses
from pathlib import Path

import jax

from vgjax import experiment
from vgjax.errors import UserError
from vgjax.open import tune
from vgjax.open.families import is_open
from vgjax.open.store import Store
from vgjax.parallel import layouts
from vgjax.parallel.layouts import Placement
from vgjax.pipeline import published, trained
from vgjax.pipeline.codec import Codec
from vgjax.pipeline.pipeline import Pipeline
from vgjax.typing import Conditioner, Params, PyTree


def load(path: str | Path, weights: str | None = None, layout: str = "", devices: int = 0) -> Pipeline:
    """The pipeline of a training workdir (its checkpoints, one step), of a converted folder, or of a finetuning.

    weights: of a run, `ema` (the default) or `params`. It samples on one device, or on the first `devices` (0: all) by
    the `layout` of this name; see `trained.load` for several processes.
    """
    path = Path(path).absolute()
    if weights not in (None, "ema", "params"):
        raise UserError(f"weights={weights!r} is unknown: use ema or params")
    if devices < 0 or (devices and not layout):
        raise UserError(
            f"devices={devices} must be 0 or more, and is of no use alone: give --layout, {', '.join(layouts.LAYOUTS)}"
        )
    if is_open(path):
        if weights:
            raise UserError(f"--weights is for runs trained here: {path} holds what was published")
        folder, tuned = path, None
    elif found := tune.tuned(path, weights or "ema"):
        folder, tuned = found
    else:
        return trained.load(path, weights or "ema", layout, devices)
    if jax.process_count() > 1 and not layout:
        raise UserError(f"several processes sample together by a layout: give --layout, {', '.join(layouts.LAYOUTS)}")
    where = layouts.find(layout, devices) if layout else None
    return published.pipeline(Store(folder, experiment.compute_dtype("auto"), where, tuned))


def codec_of(built: experiment.Experiment, frozen: PyTree, where: Placement) -> Codec:
    """The VAE under a training: a frozen one, or that of the folder of open weights."""
    if built.objective.begins_published:
        return published.codec_of(folder_of(built, where))
    return trained.codec_of(built.vae, frozen, where, built.objective.model)


def folder_of(built: experiment.Experiment, where: Placement) -> Store:
    """The converted folder that a finetuning began with, in the type in which `vgjax.encode` has it too."""
    return Store(Path(built.config.weights), experiment.compute_dtype("auto"), where)


def of_training(
    built: experiment.Experiment,
    frozen: PyTree,
    where: Placement,
    encoders: Conditioner | None,
    ema: Params,
) -> tuple[Codec, Pipeline | None]:
    """(codec, pipeline) of averaged parameters in a running training; no pipeline for a VAE.

    encoders: frozen ones, that have read what will be asked.
    """
    objective, config = built.objective, built.config
    if not objective.of_latents:
        held = {"vae": ema["vae"], "stats": trained.unscaled(built.vae)}
        return trained.codec_of(built.vae, held, where), None
    if objective.begins_published:
        live = {config.component: (objective.model, objective.variables(frozen | ema))}
        pipeline = published.pipeline(folder_of(built, where), live, tune.sampled(config.to_dict()))
    else:
        pipeline = trained.pipeline(trained.Run(built, ema, frozen), where)
    if encoders:
        pipeline = dataclasses.replace(pipeline, prompts=dataclasses.replace(pipeline.prompts, conditioner=encoders))
    return pipeline.codec, pipeline
