"""Training on from a converted folder: what its models are, and what a run made of one of them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import jax
from ml_collections import ConfigDict

from vgjax.errors import UserError
from vgjax.nn.codec import LatentStats, stats_of
from vgjax.objectives.finetune import Lora
from vgjax.open import folders
from vgjax.open.families import NAMED, family_of, is_open
from vgjax.open.store import Store, Tuned, fields, reader
from vgjax.open.texts import Frozen
from vgjax.training import checkpoint
from vgjax.typing import Config, Dtype, Json, Module


def adopt(config: ConfigDict, kinds: Mapping[type, str]) -> tuple[ConfigDict, ConfigDict, LatentStats]:
    """(the config with the model's fields spelled out, the VAE's config, statistics of its latents).

    kinds: of a module, what configs call it. A `UserError` where the folder holds another model than the config says.
    """
    store, name = Store(Path(config.weights)), folders.inside(config.component, Path("config"), "config.component")
    family = family_of(store)
    if NAMED.get(config.objective.family) is not family:
        raise UserError(
            f"config.objective.family={config.objective.family!r}, but {config.weights} holds a "
            f"{store.index['_class_name']}: use the config of that family"
        )
    if not store.has(name):
        there = ", ".join(other for other in store.index if other.startswith("transformer") and store.has(other))
        raise UserError(f"config.component={name!r}: {config.weights} has no such model: use one of {there}")
    published = store.published(name)
    own, kind = fields(published, store.folder / name), kinds[reader(published, store.folder / name)[0]]
    if own.get("conditions") or own.get("image_dim"):
        raise UserError(f"{config.weights} starts from an image: only text-to-video models can be finetuned")
    said = {"kind": kind} | {key: plain(value) for key, value in own.items()}
    given = {key: plain(value) for key, value in config.model.items()}
    if other := [key for key in said if key in given and given[key] != said[key]]:
        told = ", ".join(f"{key} {said[key]} where config.model says {given[key]}" for key in other)
        raise UserError(f"{config.weights} holds another model than config.model: {told}; choose its size")
    whole = config.to_dict() | {"weights": str(store.folder.absolute())}
    whole["model"] = {**said, **whole["model"]}
    whole["objective"] = {"times": list(served(store, name)), **whole["objective"]}
    meta = checkpoint.meta(store.folder / "vae")
    of_vae = fields(meta["published"], store.folder / "vae")
    kind = kinds[reader(meta["published"], store.folder / "vae")[0]]
    return ConfigDict(whole), ConfigDict({"model": {"kind": kind, **of_vae}}), stats_of(meta["stats"])


def captions(folder: Path, family: ModuleType, model: Module, dtype: Dtype) -> Frozen:
    """The conditioner of a finetuning: its family's encoders, in the folder that it began with.

    Their widths are those that the model takes: a plan has no folder.
    """
    widths = model.text_dim, getattr(model, "pooled_dim", 0)
    return dataclasses.replace(family.conditioner(Store(folder, dtype)), widths=widths)


def served(store: Store, name: str) -> tuple[float, float]:
    """The part of time, from 0 noise to 1 data, that a model of the folder serves: one of two experts, or all."""
    boundary = store.index.get("boundary_ratio")
    if boundary is None or not store.has("transformer_2"):
        return 0.0, 1.0
    return (0.0, 1.0 - boundary) if name == "transformer" else (1.0 - boundary, 1.0)


def tuned(run: Path, weights: str = "ema") -> tuple[Path, Tuned] | None:
    """(converted folder, what the run made of a model of it), or None where `run` is no finetuning."""
    try:
        step = checkpoint.newest(run)
        config = checkpoint.meta(step)["config"]
    except UserError:
        return None
    if config.get("objective", {}).get("kind") != "finetune":
        return None
    folder = Path(config["weights"])
    if not is_open(folder):
        raise UserError(
            f"{run} was finetuned from {folder}, which is no converted folder (any more): put it back there"
        )
    folders.inside(config["component"], run, "component of its config")
    section = {key: plain(value) for key, value in config["lora"].items()}
    adapters = Lora(**section) if section["rank"] else None
    return folder, Tuned(step, config["component"], adapters, weights, sampled(config))


def sampled(config: Config) -> Json:
    """How a finetuning is sampled unless something else is said: as its config says, the video that it learned."""
    data, said = config["data"], {key: plain(value) for key, value in config.get("sample", {}).items()}
    said |= {"frames": data["frames"], "size": tuple(data["size"])}
    return said | ({"fps": data["fps"]} if data.get("fps") else {})


def merge(folder: Path, run: Tuned, to: Path, dtype: Dtype = None) -> None:
    """Writes into `to` the model that a run trained, adapters merged, in the types it was published in or `dtype`.

    The sum is fp32 and rounded once. In bf16 that is to within 2^-8 of each number: of adapters that change a kernel
    by less much is lost, which `dtype` float32 keeps.
    """
    stored, _, meta = checkpoint.opened(folder / run.component, "ema")
    ((kind, wanted),) = stored.items()
    store = Store(folder, tuned=run)
    _, params, own, _ = store.apart(run.component)
    params = params if own is None else store.merged(params, own, dtype)
    params = jax.tree.map(lambda x, leaf: x.astype(dtype or leaf.dtype), params, wanted)
    said = {key: value for key, value in meta.items() if key in ("config", "published", "prefix")}
    with checkpoint.Checkpoints(to / run.component / checkpoint.SUBDIR) as kept:
        kept.save(0, {"ema": {kind: params}}, said, wait=True)


def plain(value: object) -> object:
    """Hashable values for frozen dataclasses: lists (as JSON stores tuples) become tuples."""
    return tuple(map(plain, value)) if isinstance(value, list | tuple) else value
