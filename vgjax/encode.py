"""Videos + captions to latents in ArrayRecord: `python -m vgjax.encode --checkpoint VAE --data FOLDER --out DIR`.

A set of latents costs one pass over the videos and saves decoding and encoding in every later step. It remembers which
VAE made it, and a model trained on it refuses any other. Of a converted folder of open weights the text encoders read
the captions too, and what they made of them lies beside the latents. With `--config FILE [--config.key=value ...]`, as
a training has it, the set is that which the training needs, in `config.latents`.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vgjax import experiment
from vgjax.data.pipeline import Example, examples
from vgjax.data.sources import Clip, Folder, Latents, LatentWriter, summary
from vgjax.data.transforms import BadFiles, names
from vgjax.errors import UserError, check_finite, door
from vgjax.open.families import family_of, is_open
from vgjax.open.store import Store
from vgjax.open.texts import Frozen
from vgjax.parallel import distributed, layouts
from vgjax.pipeline import opening, trained
from vgjax.pipeline import published as of_folder
from vgjax.pipeline.codec import Codec
from vgjax.pipeline.frozen import frozen_of, frozen_vae
from vgjax.training import program
from vgjax.typing import Conditioner, Float

USAGE = "usage: python -m vgjax.encode --config configs/x.py [--config.key=value ...] [--workdir DIR]"
LOOKED_AT = 20_000  # captions that are counted at a start
CAPTIONS = 512  # read by the encoders at a time: more would fill the host's memory with embeddings


@dataclasses.dataclass(frozen=True)
class By:
    """Who makes a set: a codec, and the frozen encoders that read its captions (None: whoever trains on them does)."""

    codec: Codec
    encoders: Frozen | None = None

    def made_by(self) -> dict[str, str]:
        """What the set depends on beside the clips."""
        return {"vae": self.codec.identity()} | ({"text encoders": self.encoders.identity()} if self.encoders else {})

    def read(self, captions: Sequence[str], writer: LatentWriter) -> None:
        """Writes what the encoders make of the captions, and of the empty one that stands for a dropped one."""
        unique = list(dict.fromkeys([*captions, ""])) if self.encoders else []
        for start in range(0, len(unique), CAPTIONS):
            some = unique[start : start + CAPTIONS]
            writer.add_texts(some, self.encoders(some, keep=False))


def ensure(source: Folder, data: ConfigDict, by: By, out: Path, bad_files: Path) -> None:
    """Writes the latents of every clip of `source` to `out`, unless they are there, made by the same models.

    Where clips or captions have changed since, the set is written anew: latents of unchanged files are taken over.
    """
    clip = Clip(data.frames, tuple(data.size), data.fps)
    made_by = by.made_by() | {
        "frames": data.frames,
        "size": list(data.size),
        "fps": data.fps,
        "source": str(source.path),
    }
    stamp, old = source.stamp(), None
    if out.exists():
        old = Latents(out)
        there = old.meta["meta"]
        other = [key for key in made_by if there.get(key) != made_by[key]]
        if other:
            raise UserError(
                f"the latents in {out} were made with another {', '.join(other)}: delete the folder or give another one"
            )
        if there.get("stamp") == stamp:
            return
        if jax.process_count() > 1:
            raise UserError(f"clips of {source.path} have changed since {out} was written: run vgjax.encode before")
    by.codec.latent_shape(data.frames, tuple(data.size))
    known = old.contents() if old else {}
    contents = {record: source.content(record) for record in range(len(source))} if known else {}
    kept = {record: known[content] for record, content in contents.items() if content in known}
    bad = BadFiles(bad_files, names(source), clip.settings)
    with LatentWriter(out, made_by | {"stamp": stamp}, replace=old is not None) as writer:
        # The captions first: what is wrong with an encoder is said before hours of clips are encoded.
        by.read([caption for _, caption in source.records], writer)
        fresh = _encoded(_readable(source, data, bad, kept), by, clip) if len(kept) < len(source) else iter(())
        coming = next(fresh, None)
        for record, (_, caption) in enumerate(source.records):
            if record in kept:
                latent, _ = old.load(kept[record])
            elif coming and coming[0] == record:
                (_, latent), coming = coming, next(fresh, None)
            else:
                continue  # it could not be read
            writer.add(latent, caption, record, contents.get(record) or source.content(record))
        bad.check(data.get("max_bad", 0.1))
    taken = f", {len(kept)} of them taken over" if kept else ""
    print(f"encoded {writer.count} of {len(source)} clips into {out}{taken}", flush=True)


def say_cut(conditioner: Conditioner, source: Folder) -> None:
    """Says how many captions are longer than what is read of them; of many, some are looked at."""
    captions = [caption for _, caption in source.records]
    apart = -(-len(captions) // LOOKED_AT)
    some = f"captions, one in {apart} looked at" if apart > 1 else "captions"
    for sentence in conditioner.cut(captions[::apart]) if jax.process_index() == 0 else []:
        distributed.note(f"{some}: {sentence}")


def _encoded(found: Iterator[Example], by: By, clip: Clip) -> Iterator[tuple[int, Float[np.ndarray, "t h w c"]]]:
    """(record, latent) of readable examples, in their order."""
    with by.codec.encoder(clip.frames, clip.size) as (batch, encode):
        for group in _groups(found, batch):
            latents = encode(np.stack([example.array for example in group]))
            yield from ((example.id, latent) for example, latent in zip(group, latents, strict=True))


def _readable(source: Folder, data: ConfigDict, bad: BadFiles, without: Collection[int]) -> Iterator[Example]:
    for example in examples(source, frames=data.frames, size=tuple(data.size), fps=data.fps, without=without):
        if example.reason is None:
            yield example
        else:
            bad.add(example.file, example.reason, "skipped" if example.id < 0 else "")


def _groups(items: Iterator[Example], size: int) -> Iterator[list[Example]]:
    while group := list(itertools.islice(items, size)):
        yield group


@door
def main(argv: list[str]) -> None:
    if any(arg.startswith(("--config", "-config")) for arg in argv[1:]):
        return of_config(argv)
    parser = argparse.ArgumentParser("python -m vgjax.encode", description="Encodes a folder of videos once.")
    parser.add_argument("--checkpoint", required=True, help="workdir of a trained VAE, or a converted folder")
    parser.add_argument("--data", required=True, help="folder of videos with captions")
    parser.add_argument("--out", required=True, help="folder for the latents")
    parser.add_argument("--frames", type=int, help="frames a clip, default: the VAE's training")
    parser.add_argument("--size", help="HxW, default: the VAE's training")
    parser.add_argument("--fps", type=float, help="default: the VAE's training")
    args = parser.parse_args(argv[1:])
    distributed.single("vgjax.encode")
    check_finite(**{"--fps": args.fps})
    folder, out = Path(args.checkpoint), Path(args.out)
    if is_open(folder):
        by, data = published(folder)
    else:
        config, frozen = frozen_vae(args.checkpoint)
        vae = experiment.model("config.model", config.model, experiment.compute_dtype(config.precision))
        by, data = By(trained.codec_of(vae, frozen)), config.data
    given = {"frames": args.frames, "size": program.size_of(args.size), "fps": args.fps}
    data.update({key: value for key, value in given.items() if value is not None})
    source = Folder(Path(args.data))
    print(summary(source), flush=True)
    if by.encoders:
        say_cut(by.encoders, source)
    ensure(source, data, by, out, out.with_suffix(".bad_files.jsonl"))


def of_config(argv: list[str]) -> None:
    """What a training by this config would encode at its first start: for jobs of several processes, which read it."""
    config, _, folder = program.read_config(argv, USAGE, workdir=False)
    distributed.single("vgjax.encode")
    config = experiment.resolve(config, Path(folder or ".").absolute())
    if not config.get("latents"):
        raise UserError("config.latents is empty: name the folder for the latents")
    config, of_vae, frozen = frozen_of(config)
    built, where = experiment.build(config, of_vae), experiment.call("config.layout", layouts.find, config.layout)
    reads = built.conditioner if built.conditioner.frozen else None
    by = By(opening.codec_of(built, frozen, where), reads.placed(where) if reads else None)
    source, out = experiment.source(config), Path(config.latents)
    print(summary(source), flush=True)
    say_cut(built.conditioner, source)
    ensure(source, config.data, by, out, out.with_suffix(".bad_files.jsonl"))


def published(folder: Path) -> tuple[By, ConfigDict]:
    """The models of a converted folder, and the clips that they are sampled as."""
    store = Store(folder.absolute(), experiment.compute_dtype("auto"))
    family = family_of(store)
    use = family.settings(store)
    by = By(of_folder.codec_of(store), family.conditioner(store))
    return by, ConfigDict({"frames": use.frames, "size": use.size, "fps": use.fps})


if __name__ == "__main__":
    program.start()
    main()
