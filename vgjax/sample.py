"""Checkpoint + prompts to mp4: `python -m vgjax.sample --checkpoint DIR --prompt "a red circle moves left" --out OUT`.

The checkpoint describes itself (config, VAE, tokenizer), so no config is needed. From Python:

    from vgjax.sample import load
    videos = load("runs/quickstart/dit")(["a red circle moves left"], seed=0)  # uint8 [n, t, h, w, 3]
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vgjax import experiment
from vgjax.data import video
from vgjax.data.storage import writing
from vgjax.errors import UserError, check_finite, door
from vgjax.flow import guidance, steppers
from vgjax.flow.path import check_seed, noise, seeded, stepper_keys
from vgjax.flow.time import Shift
from vgjax.nn import codec
from vgjax.nn.codec import decode_tiled, from_unit
from vgjax.objectives.flow import FlowObjective
from vgjax.objectives.vae import to_uint8
from vgjax.open import tune
from vgjax.open.sampler import OpenSampler, is_open, peak
from vgjax.open.store import Store
from vgjax.parallel import distributed, layouts, sharding
from vgjax.training import checkpoint, program
from vgjax.typing import Array, Float, Key, Params, PyTree, UInt8

FPS = 24.0  # of samples of a model that was trained on clips at their own rates
NUMBERED = re.compile(r"(?:contact_sheet_|sample_|frames_)?(\d{3,})\.(?:mp4|png|json|npz)")  # what `save` writes


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample; the defaults of a checkpoint are the `sample` section of its config.

    `cfg` is the scale of classifier-free guidance, acting at times within `interval`; `guidance` the scale that a
    guidance-distilled model is told instead. `batch` videos at a time are sampled and decoded, decoded in tiles of
    `tile` latent positions a side (0: whole), which overlap by half, where memory is short.
    """

    steps: int = 30
    cfg: float = 3.0
    shift: float = 1.0
    stepper: str = "euler"
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    guidance: float = 1.0
    batch: int = 32
    tile: int = 0

    def __post_init__(self) -> None:
        numbers = ("cfg", "shift", "interval", "rescale", "guidance")
        check_finite(**{name: getattr(self, name) for name in numbers})
        steppers.named(self.stepper)
        guidance.check(self.interval, self.rescale)
        if self.steps < 1 or self.batch < 1 or self.tile < 0:
            raise UserError(
                f"steps={self.steps} and batch={self.batch} must be at least 1, tile={self.tile} at least 0"
            )
        if self.shift <= 0:
            raise UserError(f"shift={self.shift} must be positive")


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler:
    """A trained model ready to sample: call it with captions. `where` is the (layout, mesh) its parameters lie on.

    `step`: of the training that it was read from.
    """

    experiment: experiment.Experiment
    params: Params
    frozen: PyTree
    settings: Settings
    where: tuple[Any, Any] | None = None
    step: int = 0

    def __call__(self, captions: Sequence[str], **options: Any) -> UInt8[np.ndarray, "n t h w 3"]:
        """Videos of `captions`; options as `latents` takes them."""
        use = dataclasses.replace(
            self.settings, **{name: options[name] for name in ("batch", "tile") if name in options}
        )
        latents = self.latents(captions, **options)
        with self._here():
            parts = [latents[i : i + use.batch] for i in range(0, len(latents), use.batch)]
            videos, finite = zip(*(self._decoded(part, use.tile) for part in parts), strict=True)
        codec.check_finite(np.concatenate(finite), captions)
        return np.concatenate(videos)

    def _decoded(self, z: Array, tile: int) -> tuple[np.ndarray, np.ndarray]:
        """(pixels, which samples are finite)."""
        vae, params, stats = self.experiment.vae, self.frozen["vae"], self.frozen["stats"]
        if not tile or tile >= max(z.shape[2:4]):
            return distributed.fetch(_decode(vae, params, stats, z))
        frames = decode_tiled(vae, params, from_unit(z, stats), tile, tile // 2, fetch=distributed.fetch)
        return distributed.fetch(_pixels(frames))

    def _here(self) -> contextlib.AbstractContextManager:
        return sharding.use(*self.where) if self.where else contextlib.nullcontext()

    def latents(
        self,
        captions: Sequence[str],
        seed: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        negative: str = "",
        first: int = 0,
        **settings: Any,
    ) -> Float[Array, "n t h w c"]:
        """Unit-scale latents of `captions`; sample i's noise depends on `(seed, first + i)` alone.

        `frames` is 1 + a multiple of the VAE's time factor, `size` is (height, width) in pixels; both default to what
        the model was trained on. Every field of `Settings` may be given.
        """
        if not captions:
            raise UserError("no prompts to sample: give --prompt or a --prompts file with one prompt a line")
        use, key = dataclasses.replace(self.settings, **settings), seeded(seed)
        data = self.experiment.config.data
        shape = self.experiment.vae.latent_shape(frames or data.frames, *(size or tuple(data.size)))
        self.experiment.objective.model.tokens(shape[:3])  # refuses a grid that the patch does not divide
        guided = use.cfg != 1.0
        out = []
        for start in range(0, len(captions), use.batch):
            some = list(captions[start : start + use.batch])
            index = np.arange(first + start, first + start + use.batch, dtype=np.uint32)
            padded = some + [""] * (use.batch - len(some))  # one compiled size
            texts = [self.experiment.tokenizer(text) for text in padded + [negative] * (use.batch if guided else 0)]
            text, mask = (np.stack(part) for part in zip(*texts, strict=True))
            with self._here():
                z = integrated(self.experiment.objective, use, shape, self.params, text, mask, index, key)
            out.append(z[: len(some)])
        return jnp.concatenate(out)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def integrated(
    objective: FlowObjective,
    use: Settings,
    shape: tuple[int, int, int, int],
    params: Params,
    text: PyTree,
    mask: Array,
    index: Array,
    key: Array,
) -> Array:
    keys = stepper_keys(key, index)
    return follow(objective, use, params, text, mask, noise(key, index, shape), keys)


def follow(
    objective: FlowObjective,
    use: Settings,
    params: Params,
    text: PyTree,
    mask: Array,
    x: Array,
    keys: Key,
    t: float | int = 0.0,
) -> Array:
    """Latents from `x` at time `t` on; with guidance `text` and `mask` are doubled, the captions first.

    keys: what the stepper of each sample draws from.
    """
    v = objective.bind(params, text, mask, use.guidance)
    if use.cfg != 1.0:
        v = guidance.cfg(v, use.cfg, use.interval, use.rescale)
    shift = dataclasses.replace(objective.shift, factor=use.shift)
    times = shift(jnp.linspace(0.0, 1.0, use.steps + 1), objective.model.tokens(x.shape[1:4]))
    return steppers.integrate(steppers.named(use.stepper), v, x, t + (1 - t) * times, keys)


@functools.partial(jax.jit, static_argnums=0)
def _decode(vae: Any, params: Params, stats: PyTree, z: Array) -> tuple[Array, Array]:
    return _pixels(vae.apply({"params": params}, from_unit(z, stats), method="decode"))


def _pixels(frames: Array) -> tuple[Array, Array]:
    """(uint8 pixels, which videos are finite)."""
    return to_uint8(frames), jnp.isfinite(frames).all(axis=(1, 2, 3, 4))


def settings_of(config: ConfigDict) -> Settings:
    """The sampling defaults of a flow config; its training shift is also the sampling shift unless said otherwise."""
    return experiment.call(
        "config.sample", Settings, {"shift": config.shift.get("factor", Shift().factor), **config.sample}
    )


def load(path: str | Path, weights: str = "ema", layout: str = "", devices: int = 0) -> Sampler:
    """A Sampler from a training workdir, its checkpoints or one step; `weights` is `ema` or `params`.

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
        parts.update(experiment=built, frozen=frozen, settings=settings_of(config), where=where)
        return {weights: sharding.abstract(needed, where)}

    tree, _, step = checkpoint.load(path, items=(weights,), place=place)
    return Sampler(params=tree[weights], step=step, **parts)


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


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; a wrong one ends in exit code 2."""
    parser = argparse.ArgumentParser("python -m vgjax.sample", description="Samples videos from a checkpoint.")
    parser.add_argument(
        "--checkpoint", required=True, help="training workdir, its checkpoints or one step, or a converted folder"
    )
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompts", help="file with one prompt a line")
    parser.add_argument(
        "--out",
        required=True,
        help="folder for mp4s, contact sheet and sample.json; numbers go on behind what is there",
    )
    parser.add_argument("--num", type=int, default=1, help="videos per prompt")
    parser.add_argument("--seed", type=int, default=0, help="0 to 2^64 - 1")
    parser.add_argument("--steps", type=int, help="integration steps")
    parser.add_argument("--cfg", type=float, help="guidance scale, 1 for none")
    parser.add_argument("--shift", type=float, help="timestep shift")
    parser.add_argument("--rescale", type=float, help="guidance rescale in [0, 1]")
    parser.add_argument("--interval", type=float, nargs=2, help="times between which guidance acts")
    parser.add_argument("--guidance", type=float, help="scale told to a guidance-distilled model")
    parser.add_argument("--stepper", help=", ".join(steppers.STEPPERS))
    parser.add_argument("--batch", type=int, help="videos at a time")
    parser.add_argument("--tile", type=int, help="decode in tiles of so many latent positions a side; 0: whole")
    parser.add_argument("--negative", help="prompt to guide away from")
    parser.add_argument("--image", help="picture that the video starts from, for models that take one")
    parser.add_argument("--frames", type=int, help="1 + a multiple of the VAE's time factor")
    parser.add_argument("--size", help="HxW in pixels")
    parser.add_argument("--weights", choices=("ema", "params"), help="of a run; default: ema")
    parser.add_argument("--layout", default="", help=f"sample on several devices: {', '.join(layouts.LAYOUTS)}")
    parser.add_argument("--devices", type=int, default=0, help="how many of them, 0 for all")
    parser.add_argument("--codec", default="libx264")
    return parser.parse_args(argv)


def prompts_of(args: argparse.Namespace) -> list[str]:
    """All prompts in order, each `--num` times; empty lines are left out."""
    prompts = [prompt for prompt in args.prompt if prompt.strip()]
    if args.prompts:
        file = Path(args.prompts)
        if not file.is_file():
            raise UserError(f"--prompts {file} is not a file")
        try:
            prompts += [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {file} can't be read as UTF-8 text: {error}") from error
    if not prompts:
        raise UserError("no prompts to sample: give --prompt or a --prompts file with one prompt a line")
    if args.num < 1:
        raise UserError(f"--num {args.num} must be at least 1")
    return [prompt for prompt in prompts for _ in range(args.num)]


@door
def main(argv: list[str]) -> None:
    args = parse(argv[1:])
    distributed.join()
    prompts, size = prompts_of(args), program.size_of(args.size)
    check_seed("seed", args.seed)
    if args.devices < 0 or (args.devices and not args.layout):
        raise UserError(f"--devices {args.devices}: give --layout, {', '.join(layouts.LAYOUTS)}, and 0 or more devices")
    out = program.workdir(args.out)
    path = Path(args.checkpoint).absolute()
    if is_open(path):
        if args.weights:
            raise UserError(f"--weights is for runs trained here: {args.checkpoint} holds what was published")
        return sample_open(args, Store(path), prompts, size, out)
    args.weights = args.weights or "ema"
    if found := tune.tuned(path, args.weights):
        folder, tuned = found
        return sample_open(args, Store(folder, tuned=tuned), prompts, size, out)
    if args.image:
        raise UserError(f"--image: {args.checkpoint} makes videos of text alone")
    sampler = load(args.checkpoint, args.weights, args.layout, args.devices)
    given = {
        name: getattr(args, name)
        for name in ("steps", "cfg", "shift", "rescale", "interval", "guidance", "stepper", "batch", "tile")
    }
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    given = {"batch": min(len(prompts), sampler.settings.batch), **given}
    sampler = dataclasses.replace(sampler, settings=dataclasses.replace(sampler.settings, **given))
    config = sampler.experiment.config
    video.check_codec(args.codec, out, size or tuple(config.data.size), rate(config))
    warn_of_cut(sampler.experiment.tokenizer, [*dict.fromkeys(prompts), *([args.negative] if args.negative else [])])
    if sampler.where:
        distributed.say(distributed.preflight(vars(args), checkpoint.versions(), sampler.where[1]))
    with distributed.peers():
        videos = sampler(prompts, seed=args.seed, frames=args.frames, size=size, negative=args.negative or "")
    if jax.process_index() == 0:
        write(out, videos, prompts, sampler, args)


def sample_open(
    args: argparse.Namespace, store: Store, prompts: list[str], size: tuple[int, int] | None, out: Path
) -> None:
    """Samples of a converted folder, or of a run that was finetuned from it, by its family's pipeline and defaults."""
    if args.batch is not None:
        raise UserError(f"--batch is for models trained here: {args.checkpoint} is sampled one video at a time")
    if jax.process_count() > 1 and not args.layout:
        raise UserError(f"several processes sample together by a layout: give --layout, {', '.join(layouts.LAYOUTS)}")
    where = layouts.find(args.layout, args.devices) if args.layout else None
    store = dataclasses.replace(store, dtype=experiment.compute_dtype("auto"), where=where)
    sampler, image = OpenSampler(store), video.read_image(args.image) if args.image else None
    names = "steps", "shift", "frames", "guidance", "stepper", "rescale"
    asked = {name: getattr(args, name) for name in names} | {"size": size}
    asked["cfg"] = (args.cfg,) if args.cfg is not None else None
    asked["interval"] = tuple(args.interval) if args.interval is not None else None
    asked = {name: value for name, value in asked.items() if value is not None}
    use = sampler.family.settings(store, **asked)
    sampler.latent_shape(use.frames, use.size)
    video.check_codec(args.codec, out, use.size, use.fps)
    distributed.say(f"{store.index['_class_name']}: {json.dumps(dataclasses.asdict(use))}")
    with distributed.peers():
        videos = sampler(prompts, args.seed, args.negative, image, args.tile or 0, **asked)
    if jax.process_index() == 0:
        save(out, videos, prompts, use.fps, args, dataclasses.asdict(use))
    distributed.say(peak())


def write(out: Path, videos: np.ndarray, prompts: list[str], sampler: Sampler, args: argparse.Namespace) -> None:
    """The videos of a model trained here."""
    settings = dataclasses.asdict(sampler.settings) | {"step": sampler.step}
    save(out, videos, prompts, rate(sampler.experiment.config), args, settings)


def rate(config: ConfigDict) -> float:
    """Frames per second of samples: those of the training, `FPS` where it took every clip at its own rate."""
    return FPS if config.data.get("fps") is None else config.data.fps


def warn_of_cut(tokenizer: Any, prompts: Sequence[str]) -> None:
    """A note on stderr of prompts that are longer than the model's text."""
    counts = [tokenizer.count(prompt) for prompt in prompts]
    if cut := [count for count in counts if count > tokenizer.length]:
        distributed.note(
            f"{len(cut)} of {len(prompts)} prompts are longer than the {tokenizer.length} tokens that the model reads "
            f"(up to {max(cut)}): the rest of them is left out"
        )


def numbered(out: Path) -> tuple[int, str]:
    """(number of the next video in a folder, what follows the names of its contact sheet and record).

    Nothing is overwritten: numbers go on behind what is there. The first run's names have no number.
    """
    names = [path.name for path in out.iterdir()]
    first = 1 + max((int(match[1]) for name in names if (match := NUMBERED.fullmatch(name))), default=-1)
    return first, f"_{first:03d}" if first or {"sample.json", "contact_sheet.png"} & set(names) else ""


def save(
    out: Path, videos: np.ndarray, prompts: list[str], fps: float, args: argparse.Namespace, settings: dict[str, Any]
) -> None:
    """The mp4s, a contact sheet, and in sample.json what would make them again; or the frames, if that fails."""
    first, after = numbered(out)
    files, sheet = [out / f"{first + i:03d}.mp4" for i in range(len(videos))], out / f"contact_sheet{after}.png"
    named = [
        {"file": file.name, "prompt": text, "index": i}
        for i, (file, text) in enumerate(zip(files, prompts, strict=True))
    ]
    record = vars(args) | settings
    record |= {"frames": videos.shape[1], "size": list(videos.shape[2:4]), "fps": fps}
    record |= {"videos": named, "versions": checkpoint.versions()}
    try:
        for file, clip in zip(files, videos, strict=True):
            video.write_mp4(file, clip, fps, codec=args.codec)
        video.contact_sheet(list(videos), prompts, path=sheet)
        with writing(out):
            (out / f"sample{after}.json").write_text(json.dumps(record, indent=1))
    except Exception:  # whatever it is, what took hours to sample is kept
        kept = video.keep_frames(f"frames_{first:03d}.npz", (out, Path(tempfile.gettempdir())), videos, prompts)
        distributed.note(f"the samples were not all written: their frames are kept in {kept}")
        raise
    print(f"{len(videos)} videos in {out}, contact sheet {sheet}")


if __name__ == "__main__":
    program.start()
    main()
