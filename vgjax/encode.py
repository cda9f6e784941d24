"""Videos + captions to latents in ArrayRecord: `python -m vgjax.encode --checkpoint VAE --data FOLDER --out DIR`.

A set of latents costs one pass over the videos and saves decoding and encoding in every later step. It remembers which
VAE made it, and a model trained on it refuses any other. Of a converted folder of open weights the text encoders read
the captions too, and what they made of them lies beside the latents.
"""

import argparse
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vgjax import experiment
from vgjax.data.pipeline import Example, examples
from vgjax.data.sources import Clip, Folder, Latents, LatentWriter, summary
from vgjax.data.transforms import BadFiles, names
from vgjax.errors import UserError, check_finite, door
from vgjax.objectives.vae import from_uint8
from vgjax.open.families import family_of, is_open
from vgjax.open.store import Store
from vgjax.open.texts import embed, identity, padded, reading
from vgjax.parallel import distributed, sharding
from vgjax.pipeline.published import Decoder
from vgjax.training import checkpoint, program
from vgjax.typing import Float, PyTree

ROWS, CLIP_BYTES = 32, 2**28  # clips encoded at a time: at most so many, of so many bytes (fp32) on a device
CAPTIONS = 512  # read by the encoders at a time: more would fill the host's memory with embeddings
Encode = Callable[[np.ndarray], np.ndarray]  # uint8 clips to latents, fp32


@dataclasses.dataclass(frozen=True)
class Trained:
    """A VAE that was trained here, on the active layout `where` if given. Captions are left to the tokenizer."""

    vae: Any
    frozen: PyTree
    where: tuple[Any, Any] | None = None

    def made_by(self) -> dict[str, str]:
        return {"vae": checkpoint.digest(self.frozen)}

    def check(self, frames: int, size: tuple[int, int]) -> None:
        """A `UserError` for clips that the VAE does not take."""
        self.vae.latent_shape(frames, *size)

    @contextlib.contextmanager
    def encoder(self, frames: int, size: tuple[int, int]) -> Iterator[tuple[int, Encode]]:
        """(clips at a time, function): as many clips as fit `CLIP_BYTES`, at least one a device, at most `ROWS`."""
        degree = 1
        if self.where:
            with sharding.use(*self.where):
                degree = sharding.degree("batch")
        fit = max(1, CLIP_BYTES // (4 * 3 * frames * math.prod(size)))
        batch = max(degree, min(ROWS, fit * degree) // degree * degree)
        of = jax.jit(lambda params, x: self.vae.apply({"params": params}, from_uint8(x), method="encode")[0])

        params = sharding.replicate(self.frozen["vae"], self.where[1]) if self.where else self.frozen["vae"]

        def encode(clips: np.ndarray) -> np.ndarray:
            rows = padded(clips, batch)
            rows = sharding.place(rows, *self.where) if self.where else rows
            return distributed.fetch(of(params, rows)).astype(np.float32)[: len(clips)]

        yield batch, encode

    def read(self, captions: Sequence[str], writer: LatentWriter) -> None:
        """Nothing: whoever trains on them reads them."""


@dataclasses.dataclass(frozen=True)
class Published:
    """The VAE and the text encoders of a converted folder."""

    store: Store
    family: Any

    def made_by(self) -> dict[str, str]:
        return {
            "vae": identity(self.store, "vae"),
            "text encoders": reading(self.store, self.family),
        }

    def check(self, frames: int, size: tuple[int, int]) -> None:
        """A `UserError` for clips that the models do not take."""
        Decoder(self.store, self.family).latent_shape(frames, size)

    @contextlib.contextmanager
    def encoder(self, frames: int, size: tuple[int, int]) -> Iterator[tuple[int, Encode]]:
        """(clips at a time, function), one at a time; the VAE is on the devices until the end of the block."""
        family, store = self.family, self.store
        with store.here(), store.model("vae") as (vae, params, _):

            def encode(clips: np.ndarray) -> np.ndarray:
                mean, _ = family.encode(vae, params, store.put(np.asarray(from_uint8(clips))))
                return distributed.fetch(mean).astype(np.float32)

            yield 1, encode

    def read(self, captions: Sequence[str], writer: LatentWriter) -> None:
        """Writes what the encoders make of the captions, and of the empty one that stands for a dropped one."""
        unique = list(dict.fromkeys([*captions, ""]))
        for start in range(0, len(unique), CAPTIONS):
            some = unique[start : start + CAPTIONS]
            c, mask, vec = embed(self.store, self.family, some, keep=False)
            for i, caption in enumerate(some):
                writer.add_text(caption, (c[i], mask[i], None if vec is None else vec[i]))


def ensure(source: Folder, data: ConfigDict, by: Trained | Published, out: Path, bad_files: Path) -> None:
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
    by.check(data.frames, tuple(data.size))
    known = old.contents() if old else {}
    contents = {record: source.content(record) for record in range(len(source))} if known else {}
    kept = {record: known[content] for record, content in contents.items() if content in known}
    bad, captions = BadFiles(bad_files, names(source), clip.settings), []
    with LatentWriter(out, made_by | {"stamp": stamp}, replace=old is not None) as writer:
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
            captions.append(caption)
        bad.check(data.get("max_bad", 0.1))
        by.read(captions, writer)
    taken = f", {len(kept)} of them taken over" if kept else ""
    print(f"encoded {writer.count} of {len(source)} clips into {out}{taken}", flush=True)


def _encoded(
    found: Iterator[Example], by: Trained | Published, clip: Clip
) -> Iterator[tuple[int, Float[np.ndarray, "t h w c"]]]:
    """(record, latent) of readable examples, in their order."""
    with by.encoder(clip.frames, clip.size) as (batch, encode):
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
        config, frozen = experiment.frozen_vae(args.checkpoint)
        dtype = experiment.compute_dtype(config.precision)
        by, data = Trained(experiment.model("config.model", config.model, dtype), frozen), config.data
    given = {"frames": args.frames, "size": program.size_of(args.size), "fps": args.fps}
    data.update({key: value for key, value in given.items() if value is not None})
    source = Folder(Path(args.data))
    print(summary(source), flush=True)
    ensure(source, data, by, out, out.with_suffix(".bad_files.jsonl"))


def published(folder: Path, where: tuple[Any, Any] | None = None) -> tuple[Published, ConfigDict]:
    """The models of a converted folder, spread over (layout, mesh) if given, and the clips that they are sampled as."""
    store = Store(folder.absolute(), experiment.compute_dtype("auto"), where)
    family = family_of(store)
    use = family.settings(store)
    return Published(store, family), ConfigDict({"frames": use.frames, "size": use.size, "fps": use.fps})


if __name__ == "__main__":
    program.start()
    main()
