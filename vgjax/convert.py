"""Open weights in and out: `python -m vgjax.convert --from FOLDER --to DIR`, and back with `--export`.

With the workdir of a finetuning as FOLDER, DIR is the converted folder that it began with, what it learned merged in.

FOLDER is a pipeline as diffusers publishes it. DIR then holds a checkpoint of each model in it that describes itself,
and what else the folder says (tokenizers, scheduler, model_index.json) as it was. Every published tensor is used once
and every parameter filled once, or nothing is written and all that does not fit is listed. Leaf by leaf is read, put
on the devices, written and let go, so a model need not fit into memory (what that costs: benchmarks/convert.py).
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from vgjax import experiment
from vgjax.data.storage import writing
from vgjax.errors import UserError, door
from vgjax.open import folders, tables, tune
from vgjax.open.store import INDEX, READERS, abstract, fields, index_of, parts_of, reader, tokenized
from vgjax.parallel import distributed, layouts, sharding
from vgjax.parallel.layouts import Placement
from vgjax.training import checkpoint, program
from vgjax.typing import Config, Json, Module, PyTree

UNFINISHED = ".unfinished"
BATCH = 2**27  # bytes of leaves that are written together, or one that is larger


@door
def main(argv: list[str]) -> None:
    args = parse(argv[1:])
    distributed.single("vgjax.convert")
    source, to = Path(args.source).absolute(), Path(args.to).absolute()
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"--to {to} is not an empty folder: nothing is overwritten, choose another")
    where = layouts.find(args.layout) if args.layout else None
    part = to.with_name(to.name + UNFINISHED)
    with writing(part):
        shutil.rmtree(part, ignore_errors=True)
    program.workdir(str(part))
    if args.export:
        export(source, part)
    elif found := tune.tuned(source):
        folder, run = found
        tune.merge(folder, run, part, args.dtype)
        rest(folder, part, {run.component})
    else:
        convert(source, part, args.dtype, where, args.only)
    with writing(to):
        if to.exists():
            to.rmdir()
        part.rename(to)
    print(f"done: {to}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m vgjax.convert", description="Open weights to checkpoints and back.")
    parser.add_argument(
        "--from",
        dest="source",
        required=True,
        help="folder of a published pipeline (or a converted one, or a finetuning)",
    )
    parser.add_argument("--to", required=True, help="an empty or new folder")
    parser.add_argument("--dtype", choices=tables.FLOATS, help="of the parameters; default: as published")
    parser.add_argument("--layout", default="", help=f"load spread over all devices: {', '.join(layouts.LAYOUTS)}")
    parser.add_argument("--only", nargs="+", default=[], help="these models alone, as vae text_encoder")
    parser.add_argument("--export", action="store_true", help="from a converted folder back to a published one")
    return parser.parse_args(argv)


def convert(source: Path, to: Path, dtype: str | None, where: Placement | None, only: Sequence[str] = ()) -> None:
    """Every component of a published folder; what does not fit in any of them is said together, before any is read.

    Its tokenizers are tried too: else what they lack would be said when the first prompt is sampled. only: components
    that are wanted, the others need not be there: a model trained from scratch takes a VAE and encoders alone.
    """
    components = {name: Component(source / name, config) for name, config in components_of(source, only).items()}
    said = [f"{name}: {sentence}" for name, one in components.items() for sentence in one.mismatches()]
    if said:
        more = f"; and {len(said) - 20} more" if len(said) > 20 else ""
        raise UserError(f"{source} does not fit, in {len(said)} place(s): {'; '.join(said[:20])}{more}")
    for name in parts_of(source):
        if name.startswith("tokenizer") and (source / name).is_dir():
            tokenized(source / name, ["a cat walks"], 8)
    types = {name: one.dtypes(dtype) for name, one in components.items()}
    for name in types:
        start, one = time.perf_counter(), components.pop(name)
        size = one.load(to / name, types[name], where)
        seconds = time.perf_counter() - start
        rate = f"{size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s)"
        print(f"{name}: {rate}", file=sys.stderr, flush=True)
    unwanted = {name for name in parts_of(source) if only and name not in only and not name.startswith("tokenizer")}
    rest(source, to, set(types) | unwanted)


def components_of(source: Path, only: Sequence[str] = ()) -> dict[str, Json]:
    """The config.json of every component with weights, or of those that are wanted, by the folder's name."""
    if not source.is_dir():
        raise UserError(f"--from {source} is no folder: give a published pipeline")
    found, parts = {}, parts_of(source)
    if unknown := [name for name in only if name not in parts]:
        raise UserError(f"--only {unknown[0]}: {source / INDEX} names {', '.join(parts)}")
    for name, kind in parts.items():
        folder = source / name
        if only and name not in only:
            continue
        if not folder.is_dir():
            raise UserError(f"{source} lacks the folder {name}, which {INDEX} names: download it")
        if (folder / "config.json").is_file() or kind in READERS:  # else a tokenizer, a scheduler
            found[name] = folders.read_json(folder / "config.json")
    if not found:
        raise UserError(f"{source / INDEX} names no model: give a published pipeline")
    return found


class Component:
    """One published model: its files, our module for it, and the weight table between the two."""

    def __init__(self, folder: Path, config: Config):
        cls, self.of_model, _ = reader(config, folder)
        self.config, self.section = dict(config), fields(config, folder)
        self.kind = next(kind for kind, (known, _) in experiment.MODELS.items() if known is cls)
        self.files, model = folders.Folder(folder), cls(**self.section)
        self.boxed = abstract(model, self.of_model)
        self.tree = sharding.unboxed(self.boxed)
        prefixes = getattr(self.of_model, "PREFIXES", (None,))
        possible = {prefix: table_of(model, self.of_model, prefix) for prefix in prefixes}
        known = self.files.shapes
        self.prefix = max(possible, key=lambda one: sum(name.format(0) in known for name in possible[one]))
        self.table = possible[self.prefix]

    def mismatches(self) -> list[str]:
        """Sentences on all in which the files are not what the model needs."""
        ignored = getattr(self.of_model, "IGNORED", ())
        return tables.mismatches(self.table, self.tree, self.files.shapes, ignored)

    def dtypes(self, dtype: str | None) -> Json:
        """The type of each leaf: as published, or as told."""
        if dtype is None:
            return tables.dtypes(self.table, self.tree, self.files.shapes)
        return dict.fromkeys(tables.flat(self.tree), jnp.dtype(dtype))

    def load(self, to: Path, types: Config, where: Placement | None) -> int:
        """From the files to a checkpoint; returns its bytes."""
        placed = tables.flat(sharding.shardings(self.boxed, *where)) if where else {}
        wanted = [
            jax.ShapeDtypeStruct(leaf.shape, types[path], sharding=placed.get(path))
            for path, leaf in tables.flat(self.tree).items()
        ]
        tree = jax.tree.unflatten(jax.tree.structure(self.tree), wanted)
        section = {"kind": self.kind, **self.section}
        meta = {"config": {"model": section}, "published": self.config, "prefix": self.prefix}
        if hasattr(self.of_model, "stats"):
            meta["stats"] = [np.asarray(row).tolist() for row in self.of_model.stats(self.config)]
        with checkpoint.Checkpoints(to / checkpoint.SUBDIR) as kept:
            name = "vae" if "stats" in meta else "model"
            leaves = tables.leaves(self.table, tree, self.files.read)
            kept.stream(0, ({"ema": {name: batch}} for batch in batches(leaves)), meta)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in wanted)


def batches(leaves: Iterator[tuple[str, PyTree]]) -> Iterator[Json]:
    """The leaves in nested dicts of `BATCH` bytes or more: each one that is saved costs 0.03 s."""
    batch: Json = {}
    for path, leaf in leaves:
        batch[path] = leaf
        if sum(one.nbytes for one in batch.values()) >= BATCH:
            yield tables.nested(batch)
            batch = {}
    if batch:
        yield tables.nested(batch)


def table_of(model: Module, of_model: ModuleType, prefix: str | None) -> tables.Table:
    """The weight table, with its names' beginning where a file of models has several."""
    return of_model.weights(model) if prefix is None else of_model.weights(model, prefix)


def export(source: Path, to: Path) -> None:
    """A converted folder back to what diffusers and transformers read."""
    models = {name for name in index_of(source) if (source / name / checkpoint.SUBDIR).is_dir()}
    for name in sorted(models):
        stored, read, meta = checkpoint.opened(source / name, "ema")
        config, ((kind, tree),) = meta["published"], stored.items()
        cls, of_model, stem = reader(config, source / name)
        table = table_of(cls(**fields(config, source / name)), of_model, meta["prefix"])
        leaves = tables.flat(tree)
        shapes = {
            entry.name: (entry.shape, leaves[entry.places[0][0].leaf].dtype.name)
            for entry in tables.entries(table, tree)
        }
        tensors = tables.export(table, tree, lambda path, read=read, kind=kind: read(f"{kind}/{path}"))
        folders.write(to / name, stem, config, tensors, shapes)
    rest(source, to, models)


def rest(source: Path, to: Path, models: set[str]) -> None:
    """Copies model_index.json and the parts that it names but for these models: tokenizers, scheduler, processors.

    What else lies in the folder (a clone's history, samples, embeddings) is no part of the pipeline.
    """
    with writing(to):
        shutil.copy(source / INDEX, to / INDEX)
        for name in parts_of(source):
            if name not in models and (source / name).is_dir():
                history = shutil.ignore_patterns(".git", ".cache")
                shutil.copytree(source / name, to / name, copy_function=_linked, ignore=history)


def _linked(source: str, to: str) -> None:
    """A copy; of a checkpoint, which is never changed, the file itself under a second name where the disk can."""
    try:
        if checkpoint.SUBDIR not in Path(source).parts:
            raise OSError("may be edited by hand")
        os.link(source, to)
    except OSError:
        shutil.copy2(source, to)


if __name__ == "__main__":
    program.start()
    main(sys.argv)
