"""Checkpoint + prompts to mp4: `python -m vgjax.sample --checkpoint DIR --prompt "a red circle moves left" --out OUT`.

The checkpoint describes itself (config, VAE, tokenizer), so no config is needed. From Python:

    from vgjax.sample import load
    videos = load("runs/quickstart/dit")(["a red circle moves left"], seed=0)  # uint8 [n, t, h, w, 3]
"""

import argparse
import dataclasses
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from vgjax.data import video
from vgjax.data.storage import writing
from vgjax.errors import UserError, door
from vgjax.flow.path import check_seed
from vgjax.flow.steppers import STEPPERS
from vgjax.parallel import distributed, layouts
from vgjax.pipeline.opening import load
from vgjax.training import checkpoint, program
from vgjax.typing import Json

NUMBERED = re.compile(r"(?:contact_sheet_|sample_|frames_)?(\d{3,})\.(?:mp4|png|json|npz)")  # what `save` writes
OPTIONS = "steps cfg shift rescale interval guidance stepper batch tile frames".split()  # fields of `Settings`


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
    parser.add_argument("--stepper", help=", ".join(STEPPERS))
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
    out = program.workdir(args.out)
    pipeline = load(args.checkpoint, args.weights, args.layout, args.devices)
    image = video.read_image(args.image) if args.image else None
    given = {name: getattr(args, name) for name in OPTIONS} | {"size": size}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    use = pipeline.defaults(**given)
    pipeline.codec.latent_shape(use.frames, use.size)
    video.check_codec(args.codec, out, use.size, use.fps)
    texts = [*dict.fromkeys(prompts), *([args.negative] if args.negative else [])]
    for sentence in pipeline.prompts.conditioner.cut(texts):
        distributed.note(sentence)
    distributed.say(f"{pipeline.name}: {json.dumps(dataclasses.asdict(use))}")
    if pipeline.where:
        distributed.say(distributed.preflight(vars(args), checkpoint.versions(), pipeline.where.mesh))
    with distributed.peers():
        videos = pipeline(prompts, args.seed, args.negative, image, **given)
    if jax.process_index() == 0:
        save(out, videos, prompts, use.fps, args, dataclasses.asdict(use) | {"model": pipeline.name})
    distributed.say(distributed.peak())


def numbered(out: Path) -> tuple[int, str]:
    """(number of the next video in a folder, what follows the names of its contact sheet and record).

    Nothing is overwritten: numbers go on behind what is there. The first run's names have no number.
    """
    names = [path.name for path in out.iterdir()]
    first = 1 + max((int(match[1]) for name in names if (match := NUMBERED.fullmatch(name))), default=-1)
    return first, f"_{first:03d}" if first or {"sample.json", "contact_sheet.png"} & set(names) else ""


def save(
    out: Path, videos: np.ndarray, prompts: list[str], fps: float, args: argparse.Namespace, settings: Json
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
