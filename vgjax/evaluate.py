"""Metrics over a checkpoint: `python -m vgjax.evaluate --checkpoint DIR`, as a table and `evaluation.json`.

For a VAE: PSNR and SSIM on held-out clips. For a flow: velocity loss in timestep bins with fixed noise, its VAE's PSNR
and SSIM, and, in a world that can be read by rules, how often a sampled clip shows what its caption says. With
`nearest`, whether each caption's sample lies nearest to its own training clip in latent space.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

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
from vgjax.flow.path import sample_keys
from vgjax.metrics import prompt
from vgjax.metrics.psnr import psnr, ssim
from vgjax.nn.codec import latent_stats
from vgjax.objectives.flow import FlowObjective
from vgjax.objectives.vae import from_uint8, to_uint8
from vgjax.parallel import distributed, sharding
from vgjax.pipeline.pipeline import Pipeline
from vgjax.pipeline.trained import Run, pipeline, wanted
from vgjax.training import checkpoint, program
from vgjax.training.log import Log, keep_until
from vgjax.typing import Params, PyTree


@dataclasses.dataclass(frozen=True)
class Plan:
    """The `evaluate` section: how many held-out clips and prompts; `path` holds held-out videos of a folder."""

    clips: int = 64
    prompts: int = 64
    nearest: bool = False
    path: str = ""


def reconstruction(vae: Any, params: Params, clips: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """(reconstructions uint8, mean PSNR in dB and SSIM over the clips) of a VAE's mean latents."""

    @jax.jit
    def one(params: Params, clip: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        mean, _ = vae.apply({"params": params}, from_uint8(clip), method="encode")
        out = to_uint8(vae.apply({"params": params}, mean, method="decode"))
        return out, psnr(from_uint8(out), from_uint8(clip)), ssim(from_uint8(out), from_uint8(clip))

    parts = [one(params, clips[i : i + 1]) for i in range(len(clips))]
    out, decibel, similar = (np.concatenate([distributed.fetch(part[k]) for part in parts]) for k in range(3))
    return out, {"psnr": float(decibel.mean()), "ssim": float(similar.mean())}


def losses(run: Run, clips: list[Example], per_bin: int = 2) -> dict[str, float]:
    """Velocity loss of EMA weights on held-out clips: `per_bin` fixed times a bin, noise fixed by clip and time."""
    objective: FlowObjective = run.experiment.objective
    tokens = [run.experiment.tokenizer(clip.caption) for clip in clips]
    raw = {
        "video": np.stack([clip.array for clip in clips]),
        "text": np.stack([ids for ids, _ in tokens]),
        "mask": np.stack([mask for _, mask in tokens]),
        "index": np.arange(len(clips), dtype=np.uint32),
    }
    prepare = jax.jit(objective.prepare)

    @jax.jit
    def at(params: Params, batch: PyTree, t: jax.Array, key: jax.Array) -> jax.Array:
        return objective.errors(params, batch, jnp.full(batch["index"].shape, t), sample_keys(key, batch["index"]))

    size, bins, table = 16, objective.bins, {}
    groups = [jax.tree.map(lambda leaf, i=i: leaf[i : i + size], raw) for i in range(0, len(clips), size)]
    groups = [prepare(run.frozen, group) for group in groups]
    for i in range(bins):
        values = []
        for j in range(per_bin):
            t, key = (i + (j + 0.5) / per_bin) / bins, jax.random.fold_in(jax.random.key(0), i * per_bin + j)
            values += [distributed.fetch(at(run.params, group, t, key)) for group in groups]
        table[f"loss/t{i}"] = float(np.concatenate(values).mean())
    table["loss"] = float(np.mean(list(table.values())))
    return table


def prompt_accuracy(sampler: Pipeline, captions: list[str], world: shapes.World, seed: int = 0) -> dict[str, float]:
    """Share of sampled clips that show the colour, shape and motion of their caption, and all of them."""
    return prompt.accuracy(list(sampler(captions, seed=seed)), captions, world)


def nearest(sampler: Pipeline, source: Folder, per_clip: int = 4, windows: int = 16, seed: int = 0) -> dict[str, Any]:
    """Whether each caption's sample lies nearest, among random windows of every clip, to its own clip (latent L2).

    `right` counts the first sample of each caption, `share` is of all `per_clip` samples of all captions.
    """
    run: Run = sampler.source
    data, objective = run.experiment.config.data, run.experiment.objective
    clip, rng = Clip(data.frames, tuple(data.size), data.fps), np.random.default_rng(seed)
    encode = jax.jit(lambda batch: objective.prepare(run.frozen, batch)["x"])
    latents, captions = [], []
    for record in range(len(source)):
        some, caption = zip(*(source.load(record, clip, rng) for _ in range(windows)), strict=True)
        latents.append(distributed.fetch(encode({"video": np.stack(some)})))
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


def report(built: experiment.Experiment, plan: Plan, params: Params, frozen: PyTree) -> dict[str, Any]:
    """Every figure that applies to this checkpoint."""
    config = built.config
    clips = clips_of(experiment.source(config, "val"), config, plan.clips)
    videos = np.stack([clip.array for clip in clips])
    if not built.objective.of_latents:
        return {"vae": reconstruction(built.vae, params["vae"], videos)[1]}
    run = Run(built, params, frozen)
    sampler = pipeline(run)
    table = {"vae": reconstruction(built.vae, frozen["vae"], videos)[1], "loss": losses(run, clips)}
    if config.data.kind == "shapes":
        world = experiment.world_of(config)
        for split, name in (("val", "held-out prompts"), ("novel", "never-trained combinations")):
            captions = experiment.captions(config, split)[: plan.prompts]
            table[name] = prompt_accuracy(sampler, captions, world)
    if plan.nearest:
        table["nearest"] = nearest(sampler, experiment.source(config, "train"))
    return table


class Show:
    """What a running training shows of itself: pictures, scores, and the statistics its checkpoints carry."""

    def __init__(self, built: experiment.Experiment, frozen: PyTree, batches: Callable[[], Iterator[PyTree]], log: Log):
        """`batches` gives the run's first batches anew at each call."""
        self.built, self.config, self.frozen, self.batches, self.log = built, built.config, frozen, batches, log
        self.flow = built.objective.of_latents
        self.plan = experiment.call("config.evaluate", Plan, self.config.get("evaluate", {}))
        vae = self.built.vae
        self.encode = jax.jit(
            lambda params, clips: vae.apply({"params": params}, from_uint8(clips), method="encode")[0]
        )

    def statistics(self, ema: Params) -> dict[str, Any]:
        """Per-channel mean and std of a VAE's latents over the run's first batches; nothing for a flow."""
        if self.flow:
            return {}
        mean, std = latent_stats(jnp.concatenate([self.encode(ema["vae"], batch["video"]) for batch in self.batches()]))
        return {"stats": [distributed.fetch(mean).tolist(), distributed.fetch(std).tolist()]}

    def images(self, number: int, ema: Params, count: int = 6) -> None:
        """Samples of held-out captions, or reconstructions under their originals, as a contact sheet."""
        if self.flow:
            captions = experiment.captions(self.config, "val")[:count]
            try:
                videos = self._sampler(ema)(captions, batch=len(captions))
            except Diverged as error:  # a training goes on: its steps are watched by themselves
                return self.log.event(number, "samples", str(error))
            self.log.images(number, "samples", np.asarray(video.contact_sheet(list(videos), captions)))
            return
        clips = clips_of(experiment.source(self.config, "val"), self.config, count)
        originals = np.stack([clip.array for clip in clips])
        out, _ = reconstruction(self.built.vae, ema["vae"], originals)
        rows = [row for pair in zip(originals, out, strict=True) for row in pair]
        names = [name for clip in clips for name in (clip.caption, "reconstruction")]
        self.log.images(number, "reconstructions", np.asarray(video.contact_sheet(rows, names)))

    def scores(self, number: int, ema: Params) -> None:
        """The figures of the averaged weights into TensorBoard and `evaluations.jsonl`."""
        try:
            table = flat(report(self.built, self.plan, ema, self.frozen))
        except Diverged as error:
            return self.log.event(number, "samples", str(error))
        self.log.scalars(number, {f"evaluate/{key}": value for key, value in table.items()})
        if not self.log.speaks:
            return
        path = self.log.workdir / "evaluations.jsonl"
        keep_until(path, number - 1)
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": number, **table}) + "\n")

    def _sampler(self, ema: Params) -> Pipeline:
        return pipeline(Run(self.built, ema, self.frozen))


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
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
    parser.add_argument("--checkpoint", required=True, help="training workdir, its checkpoints or one step")
    parser.add_argument("--data", help="folder of held-out videos, instead of the config's")
    parser.add_argument("--clips", type=int, help="held-out clips")
    parser.add_argument("--prompts", type=int, help="prompts of each kind")
    parser.add_argument("--weights", default="ema", choices=("ema", "params"))
    parser.add_argument("--out", help="JSON file, default: evaluation.json in the workdir")
    args = parser.parse_args(argv[1:])
    distributed.single("vgjax.evaluate")
    workdir = checkpoint.workdir_of(args.checkpoint)
    tree, meta, number = checkpoint.load(args.checkpoint, items=(args.weights,))
    out = Path(args.out or workdir / "evaluation.json").absolute()
    program.workdir(str(out.parent))  # said before all is measured
    config, frozen, of_vae = ConfigDict(meta["config"]), {}, None
    if config.objective.kind == "finetune":
        raise UserError(f"{args.checkpoint} is a finetuning, of which nothing is measured: sample it with vgjax.sample")
    if args.data and config.data.kind != "folder":
        raise UserError(f"--data {args.data}: {args.checkpoint} was trained in a world of its own, which is measured")
    if args.data:
        config.evaluate.path = args.data
    if config.data.kind == "folder" and not config.evaluate.get("path", ""):
        print(f"note: measured on the clips it was trained on, {config.data.path}: give --data for held-out ones")
    if config.objective.kind == "flow":
        of_vae, frozen = experiment.frozen_vae(workdir / "vae")
    built = experiment.build(config, of_vae)
    checkpoint.check_leaves(tree[args.weights], sharding.unboxed(wanted(built)), args.checkpoint)
    plan = experiment.call("config.evaluate", Plan, config.evaluate)
    given = {key: getattr(args, key) for key in ("clips", "prompts") if getattr(args, key) is not None}
    table = report(built, dataclasses.replace(plan, **given), tree[args.weights], frozen)
    for name, value in flat(table).items():
        print(f"{name:<48}{value:>10.4f}")
    with writing(out):
        out.write_text(json.dumps({"checkpoint": str(args.checkpoint), "step": number, **table}, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    program.start()
    main()
