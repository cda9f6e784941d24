"""Open weights in and out: `python -m vgjax.convert --from FOLDER --to DIR`, and back with `--export`.

FOLDER is a pipeline as diffusers publishes it. DIR then holds a checkpoint of each model in it that describes itself,
and what else the folder says (tokenizers, scheduler, model_index.json) as it was. Every published tensor is used once
and every parameter filled once, or nothing is written and all that does not fit is listed. Tensors go one by one to
their place on the devices, so the host needs little more memory than the model.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgjax import checkpoint, distributed, experiment, layouts, program, published, sharding, weights
from vgjax.errors import UserError, door
from vgjax.families.store import INDEX, READERS, abstract, fields, reader
from vgjax.storage import writing

UNFINISHED = ".unfinished"


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
    else:
        convert(source, part, args.dtype, where)
    with writing(to):
        if to.exists():
            to.rmdir()
        part.rename(to)
    print(f"done: {to}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m vgjax.convert", description="Open weights to checkpoints and back.")
    parser.add_argument(
        "--from", dest="source", required=True, help="folder of a published pipeline (or a converted one)"
    )
    parser.add_argument("--to", required=True, help="an empty or new folder")
    parser.add_argument("--dtype", choices=weights.FLOATS, help="of the parameters; default: as published")
    parser.add_argument("--layout", default="", help=f"load spread over all devices: {', '.join(layouts.LAYOUTS)}")
    parser.add_argument("--export", action="store_true", help="from a converted folder back to a published one")
    return parser.parse_args(argv)


def convert(source: Path, to: Path, dtype: str | None, where: Any) -> None:
    """Every component of a published folder; what does not fit in any of them is said together."""
    components = components_of(source)
    files: dict[str, published.Folder] = {}
    said: list[str] = []
    for name, config in components.items():
        files[name] = published.Folder(source / name)
        cls, of_model, _ = reader(config, source / name)
        model = cls(**fields(config, source / name))
        wanted = sharding.unboxed(abstract(model, of_model))
        table, _ = table_of(model, of_model, files[name])
        found = weights.mismatches(table, wanted, files[name].shapes, getattr(of_model, "IGNORED", ()))
        said += [f"{name}: {sentence}" for sentence in found]
    if said:
        more = f"; and {len(said) - 20} more" if len(said) > 20 else ""
        raise UserError(f"{source} does not fit, in {len(said)} place(s): {'; '.join(said[:20])}{more}")
    for name, config in components.items():
        start = time.perf_counter()
        size = component(config, files.pop(name), to / name, dtype, where, source / name)
        seconds = time.perf_counter() - start
        print(
            f"{name}: {size / 1e9:.2f} GB in {seconds:.1f} s ({size / 1e6 / seconds:,.0f} MB/s)",
            file=sys.stderr,
            flush=True,
        )
    with writing(to):
        for entry in sorted(source.iterdir()):
            if entry.is_dir() and entry.name not in components:
                shutil.copytree(entry, to / entry.name)
            elif entry.suffix == ".json":
                shutil.copy(entry, to / entry.name)


def components_of(source: Path) -> dict[str, dict[str, Any]]:
    """The config.json of every component with weights, by the folder's name."""
    if not source.is_dir():
        raise UserError(f"--from {source} is no folder: give a published pipeline")
    index = published.read_json(source / INDEX)
    named = {name: held for name, held in index.items() if isinstance(held, list) and len(held) == 2 and held[1]}
    found = {}
    for name, (_, kind) in named.items():
        folder = source / name
        if not folder.is_dir():
            raise UserError(f"{source} lacks the folder {name}, which {INDEX} names: download it")
        if not (folder / "config.json").is_file() and (kind not in READERS):
            continue  # a tokenizer, a scheduler
        config = published.read_json(folder / "config.json")
        reader(config, folder)
        found[name] = config
    if not found:
        raise UserError(f"{source / INDEX} names no model: give a published pipeline")
    return found


def table_of(model: Any, of_model: ModuleType, files: published.Folder) -> tuple[weights.Table, str | None]:
    """(the weight table for these files, what its names begin with where a model's names may begin differently)."""
    for prefix in (prefixes := getattr(of_model, "PREFIXES", ("",))):
        table = prefixed(model, of_model, prefix)
        if any(name.format(0) in files.shapes for name in table):
            return table, prefix
    return prefixed(model, of_model, prefixes[0]), prefixes[0]


def prefixed(model: Any, of_model: ModuleType, prefix: str | None) -> weights.Table:
    return of_model.weights(model, prefix) if hasattr(of_model, "PREFIXES") else of_model.weights(model)


def component(
    config: Mapping[str, Any], files: published.Folder, to: Path, dtype: str | None, where: Any, source: Path
) -> int:
    """One model, from its files to a checkpoint; returns its bytes."""
    cls, of_model, _ = reader(config, source)
    model = cls(**fields(config, source))
    boxed = abstract(model, of_model)
    tree = sharding.unboxed(boxed)
    table, prefix = table_of(model, of_model, files)
    types = weights.dtypes(table, tree, files.shapes) if dtype is None else None
    paths = list(weights.flat(tree))
    kinds = jax.tree.unflatten(jax.tree.structure(tree), [types[path] if types else jnp.dtype(dtype) for path in paths])
    if where:
        placed = sharding.shardings(boxed, *where)
        wanted = jax.tree.map(lambda x, kind, at: jax.ShapeDtypeStruct(x.shape, kind, sharding=at), tree, kinds, placed)
    else:
        wanted = jax.tree.map(lambda x, kind: jax.ShapeDtypeStruct(x.shape, kind), tree, kinds)
    params = weights.load(table, wanted, files.read)
    kind = next(kind for kind, (known, _) in experiment.MODELS.items() if known is cls)
    section = {"kind": kind, **fields(config, source)}
    meta = {"config": {"model": section}, "published": dict(config), "prefix": prefix}
    if hasattr(of_model, "stats"):
        meta["stats"] = [np.asarray(row).tolist() for row in of_model.stats(config)]
    with checkpoint.Checkpoints(to / checkpoint.SUBDIR) as kept:
        kept.save(0, {"ema": {"vae" if "stats" in meta else "model": params}}, meta, wait=True)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def export(source: Path, to: Path) -> None:
    """A converted folder back to what diffusers and transformers read."""
    index = published.read_json(source / INDEX)
    done = set()
    for name, held in index.items():
        if not isinstance(held, list) or not (source / name / checkpoint.SUBDIR).is_dir():
            continue
        tree, meta, _ = checkpoint.load(source / name, items="ema")
        config = meta["published"]
        cls, of_model, stem = reader(config, source / name)
        model = cls(**fields(config, source / name))
        table = prefixed(model, of_model, meta["prefix"])
        params = next(iter(tree.values()))
        leaves = weights.flat(params)
        sizes = {
            entry.name: int(np.prod(entry.shape)) * leaves[entry.places[0][0].leaf].dtype.itemsize
            for entry in weights.entries(table, params)
        }
        published.write(to / name, stem, config, weights.export(table, params), sizes)
        done.add(name)
    with writing(to):
        for entry in sorted(source.iterdir()):
            if entry.is_dir() and entry.name not in done:
                shutil.copytree(entry, to / entry.name)
            elif entry.suffix == ".json":
                shutil.copy(entry, to / entry.name)


if __name__ == "__main__":
    program.start()
    main(sys.argv)
