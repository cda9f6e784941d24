"""Videos + captions to latents in ArrayRecord: `python -m vgjax.encode --checkpoint VAE --data FOLDER --out DIR`.

A set of latents costs one pass over the videos and saves decoding and encoding in every later step. It remembers which
VAE made it, and a model trained on it refuses any other.
"""

import argparse
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vgjax import checkpoint, distributed, experiment, program
from vgjax.data.pipeline import Example, examples
from vgjax.data.sources import Folder, Latents, LatentWriter
from vgjax.data.transforms import BadFiles, names
from vgjax.errors import UserError, door
from vgjax.objectives.vae import from_uint8
from vgjax.typing import PyTree


def ensure(
    source: Folder, config: ConfigDict, vae: Any, frozen: PyTree, out: Path, bad_files: Path, batch: int = 32
) -> None:
    """Writes the latents of every clip of `source` to `out` unless they are there, made by the same VAE."""
    data = config.data
    made_by = {
        "vae": checkpoint.digest(frozen),
        "frames": data.frames,
        "size": list(data.size),
        "fps": data.fps,
        "source": str(source.path),
    }
    if out.exists():
        there = Latents(out).meta["meta"]
        other = [key for key in made_by if there.get(key) != made_by[key]]
        if other:
            raise UserError(
                f"the latents in {out} were made with another {', '.join(other)}: delete the folder or give another one"
            )
        return
    encode = jax.jit(lambda params, clips: vae.apply({"params": params}, from_uint8(clips), method="encode")[0])
    bad = BadFiles(bad_files, names(source))
    with LatentWriter(out, made_by) as writer:
        for group in _groups(_readable(source, data, bad), batch):
            clips = np.stack([example.array for example in group])
            padded = np.concatenate([clips, np.repeat(clips[-1:], batch - len(clips), axis=0)])  # one compiled size
            latents = np.asarray(encode(frozen["vae"], padded), np.float32)
            for example, latent in zip(group, latents, strict=False):
                writer.add(latent, example.caption, example.id)
    bad.check(data.get("max_bad", 0.1))
    print(f"encoded {writer.count} of {len(source)} clips into {out}", flush=True)


def _readable(source: Folder, data: ConfigDict, bad: BadFiles) -> Iterator[Example]:
    for example in examples(source, frames=data.frames, size=tuple(data.size), fps=data.fps):
        if example.reason is None:
            yield example
        else:
            bad.add(example.file, example.reason)


def _groups(items: Iterator[Example], size: int) -> Iterator[list[Example]]:
    while group := list(itertools.islice(items, size)):
        yield group


@door
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("python -m vgjax.encode", description="Encodes a folder of videos once.")
    parser.add_argument("--checkpoint", required=True, help="workdir of a trained VAE")
    parser.add_argument("--data", required=True, help="folder of videos with captions")
    parser.add_argument("--out", required=True, help="folder for the latents")
    parser.add_argument("--frames", type=int, help="frames a clip, default: the VAE's training")
    parser.add_argument("--size", help="HxW, default: the VAE's training")
    parser.add_argument("--fps", type=float, help="default: the VAE's training")
    args = parser.parse_args(argv[1:])
    distributed.single("vgjax.encode")
    config, frozen = experiment.frozen_vae(args.checkpoint)
    given = {"frames": args.frames, "size": program.size_of(args.size), "fps": args.fps}
    config.data.update({key: value for key, value in given.items() if value is not None})
    vae = experiment.model("config.model", config.model, experiment.compute_dtype(config.precision))
    out = Path(args.out)
    ensure(Folder(Path(args.data)), config, vae, frozen, out, out.with_suffix(".bad_files.jsonl"))


if __name__ == "__main__":
    program.start()
    main()
