"""Folders of published weights: safetensors with their index and config.json, as diffusers and transformers write them.

Only safetensors are read: a pickle can run any code of its author.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by name then)
import numpy as np
from safetensors import SafetensorError, safe_open

from vgjax.data.storage import writing
from vgjax.errors import UserError
from vgjax.typing import Config, Json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SHARD = 5 * 10**9  # bytes of a file, as the hub has them
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODES = {name: code for code, name in TYPES.items()}
INDEX = ".safetensors.index.json"


class Folder:
    """The tensors of one folder: `shapes` says what is there, `read` brings one."""

    def __init__(self, folder: Path):
        self.places: dict[str, tuple[Path, int]] = {}  # the file, and the byte in it at which a tensor begins
        self.shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        for file, wanted in _files(folder).items():
            start, there = _header(file)
            if absent := sorted((wanted or there.keys()) - there.keys()):
                raise UserError(
                    f"{file} lacks {', '.join(absent[:3])}, which the index says it holds: download it again"
                )
            for name in wanted or there:
                if name in self.places:
                    raise UserError(f"{name} is in {self.places[name][0]} and in {file}: remove one of them")
                self.places[name] = file, start + there[name]["data_offsets"][0]
                self.shapes[name] = tuple(there[name]["shape"]), TYPES.get(there[name]["dtype"], there[name]["dtype"])

    def read(self, name: str) -> np.ndarray:
        """One tensor, read from the disk now: not mapped, since the pages of a map count as memory of the process."""
        (file, start), (shape, dtype) = self.places[name], self.shapes[name]
        return np.fromfile(file, dtype, math.prod(shape), offset=start).reshape(shape)


def _header(file: Path) -> tuple[int, Json]:
    """Where the tensors of a safetensors file begin, and type, shape and place behind it of each."""
    try:
        with safe_open(file, framework="numpy"):  # which checks that the file is whole
            pass
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file ({error}): download it again") from error
    header.pop("__metadata__", None)
    return 8 + size, header


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a folder, and which tensors its index says are in each (None: all that are there)."""
    indices = sorted(folder.glob(f"*{INDEX}"))
    if indices:
        index = [path for path in indices if "." not in path.name.removesuffix(INDEX)] or indices
        files: dict[Path, set[str] | None] = {}
        places = read_json(index[0]).get("weight_map", {})
        if not isinstance(places, dict):
            raise UserError(f"{index[0]}: weight_map is a {type(places).__name__}, not an object: download it again")
        for name, file in places.items():
            files.setdefault(folder / inside(file, index[0], f"weight_map.{name}"), set()).add(name)
        if absent := sorted(path.name for path in files if not path.is_file()):
            raise UserError(f"{folder} lacks {', '.join(absent)}, which {index[0].name} names: download them")
        return files
    found = sorted(folder.glob("*.safetensors"))
    plain = [path for path in found if "." not in path.stem] or found
    if len(plain) > 1:
        raise UserError(f"{folder} holds {', '.join(path.name for path in plain)} and no index: leave one of them")
    if not plain:
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        why = f"only {pickles[0]}, and a pickle can run any code of its author" if pickles else "no weights"
        raise UserError(f"{folder} holds {why}: get the safetensors of this model")
    return {plain[0]: None}


def inside(name: object, file: Path, key: str) -> str:
    """`name`, which `key` of `file` gives, where it is one plain name inside the folder; else a `UserError`.

    A symbolic link of this name may leave the folder: whoever made it owns the disk, and not whoever wrote the file.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise UserError(
            f"{file}: {key} is {name!r}, which is no plain name of a file or folder beside it: get this model from "
            "someone you trust"
        )
    return name


def read_json(path: Path) -> Json:
    """A JSON object, or a `UserError` that says what is wrong with the file."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the folder of a published model") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not an object: download it again")
    return found


def write(
    folder: Path,
    stem: str,
    config: Config,
    tensors: Iterator[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
) -> None:
    """The tensors in files of at most `SHARD` bytes with an index, or in one file, beside their config.json.

    Each is written before the next is asked for. shapes: shape and type of each, in the order in which they come.
    """
    sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in shapes.items()}
    shards: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > SHARD:
            shards.append({})
        shards[-1][name] = size
    count, total = len(shards), sum(sizes.values())
    names = (
        [f"{stem}.safetensors"]
        if count == 1
        else [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for file, shard in zip(names, shards, strict=True):
            _save(folder / file, tensors, {name: shapes[name] for name in shard}, shard)
        if count > 1:
            places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n")


def _save(
    file: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    sizes: Mapping[str, int],
) -> None:
    """One safetensors file: the length of its header, the header, and the tensors, wide types first so all are aligned.

    safetensors' own writer wants all tensors at once and copies each.
    """
    places, end = {}, 0
    for name in sorted(shapes, key=lambda name: -np.dtype(shapes[name][1]).itemsize):
        places[name], end = end, end + sizes[name]
    header = {"__metadata__": {"format": "pt"}} | {
        name: {"dtype": CODES[shapes[name][1]], "shape": shapes[name][0], "data_offsets": (at, at + sizes[name])}
        for name, at in places.items()
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in itertools.islice(tensors, len(shapes)):
            assert (tensor.shape, tensor.dtype.name) == shapes[name], f"{name} is not what was said of it"
            opened.seek(8 + len(text) + places[name])
            opened.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8))


def class_of(config: Config, where: Path) -> str:
    """The class that a config.json was written by."""
    name = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise UserError(
            f"{where} names no class (_class_name or architectures): give a folder as diffusers publishes it"
        )
    return name
