"""Metrics over a checkpoint: `python -m vgjax.evaluate --checkpoint DIR`, as a table and `evaluation.json`.

For a VAE: PSNR and SSIM on held-out clips. For a flow, a finetuning or a converted folder: velocity loss in timestep
bins with fixed noise, its VAE's PSNR and SSIM, and, in a world that can be read by rules, how often a sampled clip
shows what its caption says; of a flow that may be given frames, also where it is given the first. With `nearest`,
whether each caption's sample lies nearest to its own training clip in latent space.
"""

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from ml_collections import ConfigDict

from vgjax import experiment
from vgjax.data import shapes, video
from vgjax.data.pipeline import Example, examples
from vgjax.data.sources import Clip, Folder
from vgjax.data.storage import writing
from vgjax.errors import Diverged, UserError, door
from vgjax.flow.path import errors, sample_keys
from vgjax.flow.steppers import Velocity
from vgjax.metrics import prompt
from vgjax.metrics.psnr import psnr, ssim
from vgjax.nn.codec import encode_mean, from_uint8, latent_stats
from vgjax.open.families import is_open
from vgjax.parallel import distributed, layouts, sharding
from vgjax.parallel.distributed import fetch
from vgjax.pipeline import trained
from vgjax.pipeline.codec import Codec
from vgjax.pipeline.opening import load
from vgjax.pipeline.pipeline import Pipeline
from vgjax.training import checkpoint, program
from vgjax.training.log import Log, keep_until
from vgjax.typing import Array, Config, Context, Json, Params, PyTree

ROWS, BINS, SHOWN = 16, 4, 6  # clips at a time; bins of time that a loss is told in; captions of a picture


@dataclasses.dataclass(frozen=True)
class Plan:
    """The `evaluate` section: how many held-out clips and prompts; `path` holds held-out videos of a folder."""

    clips: int = 64
    prompts: int = 64
    nearest: bool = False
    path: str = ""


def reconstruction(codec: Codec, clips: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """(reconstructions uint8, mean PSNR in dB and SSIM over the clips) of a VAE's mean latents."""
    out, _ = codec.decode(codec.encode(clips), 1)
    decibel, similar = zip(*(_compared(out[i : i + 1], clips[i : i + 1]) for i in range(len(out))), strict=True)
    return out, {"psnr": float(np.mean(decibel)), "ssim": float(np.mean(similar))}


@jax.jit
def _compared(x: Array, y: Array) -> tuple[Array, Array]:
    x, y = from_uint8(x), from_uint8(y)
    return psnr(x, y), ssim(x, y)


def losses(pipeline: Pipeline, clips: list[Example], per_bin: int = 2) -> dict[str, float]:
    """Velocity loss on held-out clips: `per_bin` fixed times in each of `BINS`, noise fixed by clip and time.

    Where models take turns each is asked at the times that it serves.
    """
    videos = np.stack([clip.array for clip in clips])
    use = pipeline.defaults(cfg=1.0, frames=videos.shape[1], size=videos.shape[2:4])
    x, context = pipeline.codec.encode(videos), pipeline.condition([clip.caption for clip in clips], use).context
    rows = context, x, np.arange(len(clips), dtype=np.uint32)
    groups = [jax.tree.map(lambda leaf, i=i: leaf[i : i + ROWS], rows) for i in range(0, len(clips), ROWS)]
    drawn = [((i + (j + 0.5) / per_bin) / BINS, i * per_bin + j) for i in range(BINS) for j in range(per_bin)]
    values: dict[int, float] = {}
    for stage in pipeline.stages(use, x.shape[1:]):
        times = stage.schedule.times
        mine = [(t, n) for t, n in drawn if len(times) > 1 and n not in values and t <= times[-1]]
        with sharding.within(pipeline.where), stage.opened() as (velocity, variables):
            for t, n in mine:
                parts = [fetch(_errors(velocity, variables, *group, t, np.uint32(n))) for group in groups]
                values[n] = float(np.concatenate(parts).mean())
    table = {f"loss/t{i}": float(np.mean([values[i * per_bin + j] for j in range(per_bin)])) for i in range(BINS)}
    return table | {"loss": float(np.mean(list(table.values())))}


@functools.partial(jax.jit, static_argnums=0)
def _errors(
    velocity: Callable[..., Velocity], variables: PyTree, context: Context, x: Array, index: Array, t: Array, n: Array
) -> Array:
    keys = sample_keys(jax.random.fold_in(jax.random.key(0), n), index)
    return errors(velocity(variables, context), x, jnp.full(index.shape, t), keys)


def prompt_accuracy(sampler: Pipeline, captions: list[str], world: shapes.World, seed: int = 0) -> dict[str, float]:
    """Share of sampled clips that show the colour, shape and motion of their caption, and all of them."""
    return prompt.accuracy(list(sampler(captions, seed=seed)), captions, world)


def given_first(sampler: Pipeline, clips: list[Example], world: shapes.World, seed: int = 0) -> dict[str, float]:
    """As `prompt_accuracy`, of samples that begin with the first frame of clips; `psnr` of that frame in dB."""
    out = [sampler([clip.caption], seed + i, image=clip.array[0])[0] for i, clip in enumerate(clips)]
    decibel = [_compared(one[None, :1], clip.array[None, :1])[0] for one, clip in zip(out, clips, strict=True)]
    return prompt.accuracy(out, [clip.caption for clip in clips], world) | {"psnr": float(np.mean(decibel))}


def nearest(sampler: Pipeline, source: Folder, clip: Clip, per_clip: int = 4, windows: int = 16, seed: int = 0) -> Json:
    """Whether each caption's sample lies nearest, among random windows of every clip, to its own clip (latent L2).

    `right` counts the first sample of each caption, `share` is of all `per_clip` samples of all captions.
    """
    rng, latents, captions = np.random.default_rng(seed), [], []
    for record in range(len(source)):
        some, caption = zip(*(source.load(record, clip, rng) for _ in range(windows)), strict=True)
        latents.append(sampler.codec.encode(np.stack(some)))
        captions.append(caption[0])
    samples = sampler.sampled([caption for caption in captions for _ in range(per_clip)], seed=seed)
    distance = np.stack([[np.square(z - sample).mean((1, 2, 3, 4)).min() for z in latents] for sample in samples])
    found = rearrange(distance.argmin(-1), "(n k) -> n k", k=per_clip)
    names = [Path(source.name(record)).name for record in range(len(source))]
    right = found == np.arange(len(names))[:, None]
    return {
        "right": int(right[:, 0].sum()),
        "of": len(names),
        "share": float(right.mean()),
        "nearest": {name: names[row[0]] for name, row in zip(names, found, strict=True)},
    }


def clips_of(source: Folder, config: ConfigDict, count: int) -> list[Example]:
    """The first `count` readable clips of a source, centre crop, first window."""
    data = config.data
    clips = examples(source, frames=data.frames, size=tuple(data.size), fps=data.fps)
    found = list(itertools.islice((clip for clip in clips if clip.reason is None), count))
    if not found:
        raise UserError(f"no readable clip in {source.path} to evaluate on")
    return found


def report(config: ConfigDict, plan: Plan, codec: Codec, pipeline: Pipeline | None) -> Json:
    """Every figure that applies: of a VAE, and of the model that makes its latents."""
    data = experiment.data_of(config)
    clips = clips_of(experiment.source(config, "val"), config, plan.clips)
    table: Json = {"vae": reconstruction(codec, np.stack([clip.array for clip in clips]))[1]}
    if pipeline is None:
        return table
    table["loss"] = losses(pipeline, clips)
    if data.kind == "shapes":
        world = experiment.world_of(config)
        for split, name in (("val", "held-out prompts"), ("novel", "never-trained combinations")):
            captions = experiment.captions(config, split)[: plan.prompts]
            table[name] = prompt_accuracy(pipeline, captions, world)
        if "known" in config:
            table["first frame given"] = given_first(pipeline, clips, world)
    if plan.nearest:
        clip = Clip(data.frames, tuple(data.size), data.fps)
        table["nearest"] = nearest(pipeline, experiment.source(config, "train"), clip)
    return table


class Show:
    """What a running training shows of itself: pictures, scores, and the statistics its checkpoints carry."""

    def __init__(
        self,
        built: experiment.Experiment,
        opened: Callable[[Params], tuple[Codec, Pipeline | None]],
        batches: Callable[[], Iterator[PyTree]],
        log: Log,
    ):
        """opened: of averaged parameters the codec and the pipeline; `batches` gives the run's first ones anew."""
        self.config, self.opened, self.batches, self.log = built.config, opened, batches, log
        self.vae = None if built.objective.of_latents else built.vae
        self.plan = plan_of(self.config)

    def statistics(self, ema: Params) -> Json:
        """Per-channel mean and std of a VAE's latents over the run's first batches; nothing for a flow."""
        if self.vae is None:
            return {}
        means = [encode_mean(self.vae, ema["vae"], batch["video"]) for batch in self.batches()]
        mean, std = latent_stats(jnp.concatenate(means))
        return {"stats": [fetch(mean).tolist(), fetch(std).tolist()]}

    def images(self, number: int, ema: Params, count: int = SHOWN) -> None:
        """Samples of held-out captions, or reconstructions under their originals, as a contact sheet."""
        codec, pipeline = self.opened(ema)
        if pipeline:
            captions = experiment.captions(self.config, "val")[:count]
            try:
                videos = pipeline(captions, batch=min(len(captions), pipeline.defaults().batch))
            except Diverged as error:  # a training goes on: its steps are watched by themselves
                return self.log.event(number, "samples", str(error))
            self.log.images(number, "samples", np.asarray(video.contact_sheet(list(videos), captions)))
            return
        clips = clips_of(experiment.source(self.config, "val"), self.config, count)
        originals = np.stack([clip.array for clip in clips])
        out, _ = reconstruction(codec, originals)
        rows = [row for pair in zip(originals, out, strict=True) for row in pair]
        names = [name for clip in clips for name in (clip.caption, "reconstruction")]
        self.log.images(number, "reconstructions", np.asarray(video.contact_sheet(rows, names)))

    def scores(self, number: int, ema: Params) -> None:
        """The figures of the averaged weights into TensorBoard and `evaluations.jsonl`."""
        try:
            table = flat(report(self.config, self.plan, *self.opened(ema)))
        except Diverged as error:
            return self.log.event(number, "samples", str(error))
        self.log.scalars(number, {f"evaluate/{key}": value for key, value in table.items()})
        if not self.log.speaks:
            return
        path = self.log.workdir / "evaluations.jsonl"
        keep_until(path, number - 1)
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": number, **table}) + "\n")


def plan_of(config: ConfigDict) -> Plan:
    """The `evaluate` section, checked."""
    return experiment.call("config.evaluate", Plan, config.get("evaluate", {}))


def shown(config: ConfigDict, plan: Plan) -> list[str]:
    """Every caption that a training reads when it shows itself, and that which stands for none."""
    splits = ("val", "novel") if config.data.kind == "shapes" else ("val",)
    found = [experiment.captions(config, split) for split in splits]
    most = max(SHOWN, plan.clips, plan.prompts)
    found += [experiment.captions(config, "train")] if plan.nearest else []
    return [*dict.fromkeys(caption for some in found for caption in some[:most]), ""]


def flat(table: Config, prefix: str = "") -> dict[str, float]:
    """`{"a": {"b": 1}}` to `{"a/b": 1}`, numbers only."""
    out = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            out[prefix + key] = value
    return out


@door
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m vgjax.evaluate", description="Measures a checkpoint.")
    parser.add_argument("--checkpoint", required=True, help="training workdir, its checkpoints, one step, or a folder")
    parser.add_argument("--data", help="folder of held-out videos, instead of the config's")
    parser.add_argument("--clips", type=int, help="held-out clips")
    parser.add_argument("--prompts", type=int, help="prompts of each kind")
    parser.add_argument("--frames", type=int, help="of a clip; for a converted folder, as --size and --fps")
    parser.add_argument("--size", help="HxW in pixels")
    parser.add_argument("--fps", type=float)
    parser.add_argument("--weights", choices=("ema", "params"), help="of a run; default: ema")
    parser.add_argument("--layout", default="", help=f"measure on several devices: {', '.join(layouts.LAYOUTS)}")
    parser.add_argument("--devices", type=int, default=0, help="how many of them, 0 for all")
    parser.add_argument("--out", help="JSON file, default: evaluation.json in the workdir")
    args = parser.parse_args(argv[1:])
    distributed.single("vgjax.evaluate")
    path = Path(args.checkpoint)
    config, codec, pipeline, number = opened(args)
    out = Path(args.out or (path if is_open(path) else checkpoint.workdir_of(path)) / "evaluation.json").absolute()
    program.workdir(str(out.parent))  # said before all is measured
    plan = plan_of(config)
    given = {key: getattr(args, key) for key in ("clips", "prompts") if getattr(args, key) is not None}
    table = report(config, dataclasses.replace(plan, **given), codec, pipeline)
    for name, value in flat(table).items():
        print(f"{name:<48}{value:>10.4f}")
    with writing(out):
        out.write_text(json.dumps({"checkpoint": str(args.checkpoint), "step": number, **table}, indent=1))
    print(f"written to {out}")


def opened(args: argparse.Namespace) -> tuple[ConfigDict, Codec, Pipeline | None, int]:
    """(config, codec, pipeline if there is a model of its latents, step) of what is to be measured."""
    path = Path(args.checkpoint)
    if is_open(path):
        if not args.data:
            raise UserError(f"{path} holds what others trained: give --data, a folder of videos with captions")
        pipeline = load(path, args.weights, args.layout, args.devices)
        given = {"frames": args.frames, "size": program.size_of(args.size), "fps": args.fps}
        use = pipeline.defaults(**{name: value for name, value in given.items() if value is not None})
        pipeline.codec.latent_shape(use.frames, use.size)
        data = {"kind": "folder", "path": args.data, "frames": use.frames, "size": use.size, "fps": use.fps}
        config = ConfigDict({"objective": {"kind": "flow"}, "data": data, "evaluate": {"path": args.data}})
        return config, pipeline.codec, pipeline, 0
    if args.frames or args.size or args.fps:
        raise UserError(f"--frames, --size and --fps have no effect: {path} is measured on clips as it was trained on")
    step = checkpoint.newest(path)
    config = ConfigDict(checkpoint.meta(step)["config"])
    if args.data and config.data.kind != "folder":
        raise UserError(f"--data {args.data}: {path} was trained in a world of its own, which is measured")
    if args.data:
        config.evaluate = {**config.get("evaluate", {}), "path": args.data}
    if config.data.kind == "folder" and not config.get("evaluate", {}).get("path", ""):
        print(f"note: measured on the clips it was trained on, {config.data.path}: give --data for held-out ones")
    if config.objective.kind != "vae":
        pipeline = load(step, args.weights, args.layout, args.devices)
        return config, pipeline.codec, pipeline, int(step.name)
    where = layouts.find(args.layout, args.devices) if args.layout else None
    return config, trained.vae_of(step, args.weights or "ema", where), None, int(step.name)


if __name__ == "__main__":
    program.start()
    main()
