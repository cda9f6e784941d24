"""The pipeline of a text-to-video model that was trained here."""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vgjax import experiment
from vgjax.errors import UserError
from vgjax.flow.sampling import Settings
from vgjax.flow.schedule import Schedule
from vgjax.flow.steppers import Velocity
from vgjax.flow.time import Shift
from vgjax.nn.codec import decode_tiled, from_unit
from vgjax.objectives.objective import Objective
from vgjax.objectives.vae import to_uint8
from vgjax.parallel import distributed, layouts, sharding
from vgjax.pipeline.pipeline import Context, Pipeline, Stage
from vgjax.training import checkpoint
from vgjax.typing import Array, Bool, Float, Params, PyTree, UInt8

FPS = 24.0  # of samples of a model that was trained on clips at their own rates


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What was read of a training: the experiment, the parameters that are sampled, what is frozen; at which step."""

    experiment: experiment.Experiment
    params: Params
    frozen: PyTree
    step: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Captions as tokens; the text encoder is one of the model's parameters."""

    tokenizer: Any

    def __call__(self, prompts: Sequence[str], use: Settings, negative: str | None, image: Any) -> Context:
        if image is not None:
            raise UserError("--image: this model makes videos of text alone")
        read = functools.lru_cache(None)(self.tokenizer)
        rows = tuple(np.stack(part) for part in zip(*map(read, prompts), strict=True))
        other = jax.tree.map(lambda row: np.repeat(row[None], len(prompts), axis=0), read(negative or ""))
        return Context(rows, other if use.guided else None, ())

    def told_of_cut(self, prompts: Sequence[str]) -> None:
        counts = [self.tokenizer.count(prompt) for prompt in prompts]
        if cut := [count for count in counts if count > self.tokenizer.length]:
            distributed.note(
                f"{len(cut)} of {len(prompts)} prompts are longer than the {self.tokenizer.length} tokens that the "
                f"model reads (up to {max(cut)}): the rest of them is left out"
            )

    def finished(self, z: Float[np.ndarray, "n t h w c"], given: PyTree) -> Float[np.ndarray, "n t h w c"]:
        return z


@dataclasses.dataclass(frozen=True, eq=False)
class Decoder:
    """The frozen VAE of a flow, and the patches that the flow asks of its latents."""

    objective: Objective
    frozen: PyTree
    where: tuple[Any, Any] | None = None

    def latent_shape(self, frames: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
        shape = self.objective.codec.latent_shape(frames, *size)
        self.objective.tokens(shape[:3])  # refuses a grid that the patch does not divide
        return shape

    def decode(
        self, z: Float[np.ndarray, "n t h w c"], batch: int, tile: int
    ) -> tuple[UInt8[np.ndarray, "n s i j 3"], Bool[np.ndarray, " n"]]:
        groups = (z[i : i + batch] for i in range(0, len(z), batch))
        with sharding.use(*self.where) if self.where else contextlib.nullcontext():
            videos, finite = zip(*(self._decoded(group, tile) for group in groups), strict=True)
        return np.concatenate(videos), np.concatenate(finite)

    def _decoded(self, z: np.ndarray, tile: int) -> tuple[np.ndarray, np.ndarray]:
        vae, params, stats = self.objective.codec, self.frozen["vae"], self.frozen["stats"]
        if not tile or tile >= max(z.shape[2:4]):
            return distributed.fetch(_decode(vae, params, stats, z))
        frames = decode_tiled(vae, params, from_unit(jnp.asarray(z), stats), tile, tile // 2, fetch=distributed.fetch)
        return distributed.fetch(pixels(frames))


@functools.partial(jax.jit, static_argnums=0)
def _decode(vae: Any, params: Params, stats: PyTree, z: Array) -> tuple[Array, Array]:
    return pixels(vae.apply({"params": params}, from_unit(z, stats), method="decode"))


def pixels(frames: Float[Array, "b t h w 3"]) -> tuple[UInt8[Array, "b t h w 3"], Bool[Array, " b"]]:
    """(bytes, which videos are finite), on the device: a quarter to copy."""
    return to_uint8(jnp.asarray(frames)), jnp.isfinite(frames).all(axis=(1, 2, 3, 4))


@dataclasses.dataclass(frozen=True)
class Bound:
    """The velocity of an objective, as stages make it."""

    objective: Any

    def __call__(self, params: Params, texts: PyTree, guidance: float | int, given: PyTree) -> Velocity:
        return self.objective.bind(params, *texts, guidance)


def pipeline(run: Run, where: tuple[Any, Any] | None = None) -> Pipeline:
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

    codec = Decoder(objective, run.frozen, where)
    name = f"{config.model.kind}, step {run.step}"
    return Pipeline(name, run, Tokens(run.experiment.tokenizer), stages, codec, defaults, where)


def schedule_of(objective: Any, use: Settings, shape: tuple[int, int, int, int]) -> Schedule:
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
    if weights not in ("ema", "params"):
        raise UserError(f"weights={weights!r} is unknown: use ema or params")
    alone = not layout and jax.process_count() == 1
    if alone and devices:
        raise UserError(f"devices={devices} is of no use without a layout: give one of {', '.join(layouts.LAYOUTS)}")
    parts: dict[str, Any] = {}

    def place(meta: dict[str, Any], tree: PyTree) -> PyTree:
        config = ConfigDict(meta["config"])
        if config.objective.kind != "flow":
            raise UserError(
                f"{path} holds a {config.objective.kind}, not a text-to-video model: give the workdir of a flow"
            )
        config.layout.kind = layout or config.layout.kind
        where = None if alone else layouts.find(config.layout.kind, devices)
        of_vae, frozen = experiment.frozen_vae(checkpoint.workdir_of(path) / "vae", where)
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
    batch = built.texts(1) | {"x": jax.ShapeDtypeStruct((1, *shape), jnp.float32)}
    return jax.eval_shape(lambda batch: objective.init(jax.random.key(0), batch), batch)
