"""Open weights: which leaf of ours holds which published tensor, as a table that is read in both directions.

A model file maps the name of every published tensor to the `Part` of a leaf that holds it, or to several that lie one
behind the other (`Joined`). A "{}" in a name counts layers: the first dim of the leaf. So a table is a permutation of
numbers: loading and exporting lose no bit, and whatever does not fit is known before anything is read.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vgjax.errors import UserError
from vgjax.typing import Config, Dtype, Json, PyTree

FLOATS = ("float32", "bfloat16", "float16")
STRIP = 64  # bytes of a row that are written before the next row's


@dataclasses.dataclass(frozen=True)
class Part:
    """What stands in a leaf of ours as a tensor of theirs.

    leaf: its path. dims: einops from ours to theirs, as "d h k -> (h k) d"; as they are if empty. at: the place in a
    leading dim of the leaf (behind the layers). order: (name of a dim, indices of a size): ours is theirs taken at
    these. sizes: of what `dims` groups on our side.
    """

    leaf: str
    dims: str = ""
    at: int | None = None
    order: tuple[str, Callable[[int], np.ndarray]] | None = None
    sizes: tuple[tuple[str, int], ...] = ()

    def theirs(self, ours: Any) -> Any:
        """Their tensor, of ours (an array, or one that is traced)."""
        if not self.dims:
            return ours
        left, flat, between, right = self._sides()
        x = rearrange(ours, f"{left} -> {flat}", **dict(self.sizes))
        x = rearrange(x, f"{flat} -> {between}")
        x = copied(np.empty(x.shape, x.dtype), x) if isinstance(x, np.ndarray) else x
        return rearrange(self._taken(x, between, back=True), f"{between} -> {right}")

    def fill(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Ours, in its type, of their tensor."""
        if not self.dims:
            ours[...] = theirs
            return
        left, flat, between, right = self._sides()
        ours = rearrange(ours, f"{left} -> {flat}", **dict(self.sizes))
        x = rearrange(theirs, f"{right} -> {between}", **self._named(flat, ours.shape))
        copied(ours, rearrange(self._taken(x, between, back=False), f"{between} -> {flat}"))

    def _sides(self) -> tuple[str, str, str, str]:
        """Ours and theirs, each also without its groups."""
        left, right = (side.strip() for side in self.dims.split("->"))
        flat, between = (side.replace("(", "").replace(")", "") for side in (left, right))
        return left, flat, between, right

    def _named(self, dims: str, shape: tuple[int, ...]) -> dict[str, int]:
        return {name: size for name, size in zip(dims.split(), shape, strict=True) if name != "1"}

    def _taken(self, x: Any, dims: str, back: bool) -> Any:
        if self.order is None:
            return x
        name, indices = self.order
        dim = dims.split().index(name)
        at = indices(x.shape[dim])
        return x.take(np.argsort(at) if back else at, axis=dim)


@dataclasses.dataclass(frozen=True)
class Joined:
    """A tensor of theirs in which parts of several leaves lie one behind the other along `axis`."""

    parts: tuple[Part, ...]
    axis: int


Table = dict[str, Part | Joined]


def linear(theirs: str, ours: str, bias: bool = True) -> Table:
    """A torch Linear and our kernel and bias."""
    table: Table = {f"{theirs}.weight": Part(f"{ours}/kernel", "i o -> o i")}
    return table | ({f"{theirs}.bias": Part(f"{ours}/bias")} if bias else {})


def norm(theirs: str, ours: str, bias: bool = True) -> Table:
    """A torch norm and our scale and bias."""
    return {f"{theirs}.weight": Part(f"{ours}/scale")} | ({f"{theirs}.bias": Part(f"{ours}/bias")} if bias else {})


def mlp(up: str, down: str, ours: str, bias: bool = True) -> Table:
    """Two torch Linears and our MLP."""
    return linear(up, f"{ours}/up", bias) | linear(down, f"{ours}/down", bias)


def heads(theirs: str, ours: str, at: int, bias: bool = True, order: Any = None) -> Table:
    """A torch Linear whose features are heads, and one of the projections of our kernel and bias."""
    table: Table = {f"{theirs}.weight": Part(f"{ours}/kernel", "d h k -> (h k) d", at, order)}
    return table | ({f"{theirs}.bias": Part(f"{ours}/bias", "h k -> (h k)", at, order)} if bias else {})


def merge(theirs: str, ours: str, bias: bool = True) -> Table:
    """A torch Linear that takes heads, and our Merge."""
    table: Table = {f"{theirs}.weight": Part(f"{ours}/kernel", "h k d -> d (h k)")}
    return table | ({f"{theirs}.bias": Part(f"{ours}/bias")} if bias else {})


def expect(config: Config, **wanted: object) -> None:
    """A `UserError` where a published config asks for another architecture than the one that is written here."""
    for key, value in wanted.items():
        found = config.get(key, value)
        if found != value:
            raise UserError(
                f"{config.get('_class_name', 'config.json')}: {key}={found!r} is not supported, only {value!r}"
            )


class Entry(NamedTuple):
    """One tensor of theirs: its name, shape, the axis of its parts, and each part with where it stands in its leaf."""

    name: str
    shape: tuple[int, ...]
    axis: int
    places: list[tuple[Part, tuple[int, ...]]]


def flat(tree: PyTree) -> Json:
    """Leaves by their path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(leaves: Config) -> PyTree:
    """The dicts in which leaves lie at their path."""
    tree: Json = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        functools.reduce(lambda inner, folder: inner.setdefault(folder, {}), folders, tree)[name] = leaf
    return tree


def entries(table: Table, tree: PyTree) -> list[Entry]:
    """Every tensor of theirs, layers counted out; an assertion where a table names a leaf that is not there."""
    leaves, found = flat(tree), []
    for name, held in table.items():
        parts, axis = (held.parts, held.axis) if isinstance(held, Joined) else ((held,), 0)
        for part in parts:
            assert part.leaf in leaves, f"the weight table of {name} names {part.leaf}, which the model does not have"
        layers = range(leaves[parts[0].leaf].shape[0]) if "{}" in name else (None,)
        for layer in layers:
            places = [(part, tuple(i for i in (layer, part.at) if i is not None)) for part in parts]
            shapes = [_shape(part, leaves[part.leaf].shape[len(at) :]) for part, at in places]
            shape = list(shapes[0])
            if len(shapes) > 1:
                shape[axis] = sum(one[axis] for one in shapes)
            found.append(Entry(name if layer is None else name.format(layer), tuple(shape), axis, places))
    return found


@functools.cache
def _shape(part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
    return jax.eval_shape(part.theirs, jax.ShapeDtypeStruct(shape, jnp.float32)).shape


def uncovered(table: Table, tree: PyTree) -> list[str]:
    """Sentences on leaves that a table fills not at all, in part, or twice; none for a table that is right."""
    leaves = flat(tree)
    filled: dict[str, Counter[tuple[int, ...]]] = {path: Counter() for path in leaves}
    for entry in entries(table, tree):
        for part, at in entry.places:
            filled[part.leaf][at] += 1
    wrong = []
    for path, places in filled.items():
        depth = max(map(len, places), default=0)
        wanted = list(itertools.product(*map(range, leaves[path].shape[:depth])))
        if sorted(places.elements()) != wanted:
            wrong.append(f"leaf {path} is filled at {dict(places)}, not once at each of {len(wanted)} places")
    return wrong


def mismatches(
    table: Table, tree: PyTree, given: Mapping[str, tuple[tuple[int, ...], str]], ignored: tuple[str, ...] = ()
) -> list[str]:
    """Sentences on everything in which `given` (tensor -> shape, dtype) is not what the model needs."""
    wanted = {entry.name: entry for entry in entries(table, tree)}
    said = [f"{name} is missing, of shape {wanted[name].shape}" for name in wanted if name not in given]
    for name, (shape, dtype) in given.items():
        if name not in wanted:
            if not name.startswith(ignored or ("\0",)):
                said.append(f"{name} of shape {tuple(shape)} is not a tensor of this model")
        elif tuple(shape) != wanted[name].shape:
            said.append(f"{name} has shape {tuple(shape)}, the model needs {wanted[name].shape}")
        elif dtype not in FLOATS:
            said.append(f"{name} is of type {dtype}: only {', '.join(FLOATS)} can be read")
    return said


def dtypes(table: Table, tree: PyTree, given: Mapping[str, tuple[tuple[int, ...], str]]) -> Json:
    """The type of each leaf that keeps every bit: that of its tensors; a `UserError` where they differ."""
    found: dict[str, dict[str, str]] = {}
    for entry in entries(table, tree):
        for part, _ in entry.places:
            found.setdefault(part.leaf, {}).setdefault(given[entry.name][1], entry.name)
    for leaf, kinds in found.items():
        if len(kinds) > 1:
            told = ", ".join(f"{name} is {kind}" for kind, name in kinds.items())
            raise UserError(f"tensors of one leaf ({leaf}) have different types: {told}; give one with --dtype")
    return {leaf: jnp.dtype(next(iter(kinds))) for leaf, kinds in found.items()}


def load(table: Table, wanted: PyTree, read: Callable[[str], np.ndarray]) -> PyTree:
    """The tree `wanted` (abstract, with shardings or without) filled from their tensors."""
    filled = dict(leaves(table, wanted, read))
    return jax.tree.unflatten(jax.tree.structure(wanted), [filled[path] for path in flat(wanted)])


def leaves(table: Table, wanted: PyTree, read: Callable[[str], np.ndarray]) -> Iterator[tuple[str, jax.Array]]:
    """The leaves of `wanted` (abstract, with shardings or without) by their path, each at its place on the devices.

    The host holds one leaf and, of one tensor, what was read and a copy.
    """
    abstract = flat(wanted)
    pieces: dict[str, list[tuple[str, tuple, Part, tuple[int, ...]]]] = {path: [] for path in abstract}
    for entry in entries(table, wanted):
        start = 0
        for part, at in entry.places:
            shape = _shape(part, abstract[part.leaf].shape[len(at) :])
            taken = [slice(None)] * len(shape)
            if len(entry.places) > 1:
                taken[entry.axis] = slice(start, start := start + shape[entry.axis])
            pieces[part.leaf].append((entry.name, tuple(taken), part, at))
    for path, leaf in abstract.items():
        room = _room(leaf.shape, leaf.dtype)
        for name, taken, part, at in pieces[path]:
            part.fill(room[(*at, ...)], read(name)[taken])
        yield path, _spread(room, getattr(leaf, "sharding", None))


def _room(shape: tuple[int, ...], dtype: Dtype) -> np.ndarray:
    """Memory mapped for one leaf: it goes back when the leaf does, and JAX on CPUs takes over what begins at a page."""
    count = math.prod(shape)
    room = mmap.mmap(-1, max(count * dtype.itemsize, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        room.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(room, dtype, count).reshape(shape)


def _spread(ours: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(ours)
    return jax.make_array_from_callback(ours.shape, sharding, lambda index: ours[index])


def copied(to: np.ndarray, of: np.ndarray) -> np.ndarray:
    """`to`, which lies in order, with the numbers of `of`, which may be transposed.

    Strip by strip, so that the rows of `of` which a strip crosses stay in the cache: ten times as fast as numpy's own
    copy and XLA's transpose on CPUs.
    """
    whole = to
    if to.dtype == of.dtype:
        to, of = to.view(f"u{to.itemsize}"), of.view(f"u{to.itemsize}")
    dims: list[tuple[int, int]] = []  # (size, stride in `of`), as one where they lie behind each other in both
    for size, stride in zip(of.shape, of.strides, strict=True):
        if dims and dims[-1][1] == size * stride:
            dims[-1] = dims[-1][0] * size, stride
        elif size > 1:
            dims.append((size, stride))
    to, of = (x.reshape([size for size, _ in dims]) for x in (to, of))
    if not dims or dims[-1][1] == of.itemsize:
        to[...] = of
        return whole
    step = STRIP // to.itemsize
    for start in range(0, dims[-1][0], step):
        to[..., start : start + step] = of[..., start : start + step]
    return whole


def export(
    table: Table, tree: PyTree, read: Callable[[str], np.ndarray] | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, one after the other; of an abstract tree `read` brings a leaf, which is held while it is used."""
    bring = read or flat(tree).__getitem__
    uses = Counter(part.leaf for entry in entries(table, tree) for part, _ in entry.places)
    held: dict[str, np.ndarray] = {}
    for entry in entries(table, tree):
        parts = []
        for part, at in entry.places:
            if part.leaf not in held:
                held[part.leaf] = np.asarray(bring(part.leaf))
            parts.append(part.theirs(held[part.leaf][(*at, ...)]))
            uses[part.leaf] -= 1
            if not uses[part.leaf]:
                del held[part.leaf]
        yield entry.name, np.ascontiguousarray(np.concatenate(parts, entry.axis) if len(parts) > 1 else parts[0])
