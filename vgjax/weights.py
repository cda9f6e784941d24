"""Open weights: which leaf of ours holds which published tensor, as a table that is read in both directions.

A model file maps the name of every published tensor to the `Part` of a leaf that holds it, or to several that lie one
behind the other (`Joined`). A "{}" in a name counts layers: the first dim of the leaf. So a table is a permutation of
numbers: loading and exporting lose no bit, and whatever does not fit is known before anything is read.
"""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vgjax.errors import UserError
from vgjax.typing import PyTree

FLOATS = ("float32", "bfloat16", "float16")


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
        left, flat, right = self._sides()
        x = rearrange(ours, f"{left} -> {flat}", **dict(self.sizes))
        return rearrange(self._taken(x, flat, back=True), f"{flat} -> {right}")

    def ours(self, theirs: Any, shape: tuple[int, ...]) -> Any:
        """Ours of `shape`, of their tensor."""
        if not self.dims:
            return theirs
        left, flat, right = self._sides()
        atoms = jax.eval_shape(
            lambda x: rearrange(x, f"{left} -> {flat}", **dict(self.sizes)), jax.ShapeDtypeStruct(shape, jnp.float32)
        )
        x = rearrange(theirs, f"{right} -> {flat}", **dict(zip(flat.split(), atoms.shape, strict=True)))
        return rearrange(self._taken(x, flat, back=False), f"{flat} -> {left}")

    def _sides(self) -> tuple[str, str, str]:
        left, right = (side.strip() for side in self.dims.split("->"))
        return left, left.replace("(", "").replace(")", ""), right

    def _taken(self, x: Any, flat: str, back: bool) -> Any:
        if self.order is None:
            return x
        name, indices = self.order
        dim = flat.split().index(name)
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


def expect(config: Mapping[str, Any], **wanted: Any) -> None:
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


def flat(tree: PyTree) -> dict[str, Any]:
    """Leaves by their path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def entries(table: Table, tree: PyTree) -> list[Entry]:
    """Every tensor of theirs, layers counted out; an assertion where a table names a leaf that is not there."""
    leaves, found = flat(tree), []
    for name, held in table.items():
        parts, axis = (held.parts, held.axis) if isinstance(held, Joined) else ((held,), 0)
        for part in parts:
            assert part.leaf in leaves, f"the weight table of {name} names {part.leaf}, which the model does not have"
        layers: Any = range(leaves[parts[0].leaf].shape[0]) if "{}" in name else (None,)
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


def dtypes(table: Table, tree: PyTree, given: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Any]:
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
    """The tree `wanted` (abstract, with shardings or without) filled tensor by tensor.

    Each tensor goes to its place on the devices before the next is read: beside the tree the host holds one tensor and
    its rearranged copy.
    """
    leaves = flat(wanted)
    filled: dict[str, jax.Array] = {}
    for entry in entries(table, wanted):
        theirs = read(entry.name)
        sizes = [
            _shape(part, leaves[part.leaf].shape[len(at) :])[entry.axis] if entry.shape else 0
            for part, at in entry.places
        ]
        pieces = np.split(theirs, np.cumsum(sizes)[:-1], entry.axis) if len(sizes) > 1 else [theirs]
        for (part, at), piece in zip(entry.places, pieces, strict=True):
            leaf = leaves[part.leaf]
            ours = np.ascontiguousarray(part.ours(piece, leaf.shape[len(at) :])).astype(leaf.dtype, copy=False)
            filled[part.leaf] = _put(filled.get(part.leaf), leaf, ours, at)
    order = [filled[path] for path in leaves]
    return jax.tree.unflatten(jax.tree.structure(wanted), order)


def _put(now: jax.Array | None, leaf: Any, ours: np.ndarray, at: tuple[int, ...]) -> jax.Array:
    """The leaf, born with zeros where it is None, with `ours` at its place."""
    sharding = getattr(leaf, "sharding", None)
    if not at:
        return _spread(ours, sharding)
    if now is None:
        now = jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=sharding)()
    part = None
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = (*sharding.spec, *[None] * (len(leaf.shape) - len(sharding.spec)))
        part = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec[len(at) :]))
    return _filled(now, _spread(ours, part), jnp.asarray(at, jnp.int32))


def _spread(ours: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jax.device_put(ours)
    return jax.make_array_from_callback(ours.shape, sharding, lambda index: ours[index])


@functools.partial(jax.jit, donate_argnums=0)
def _filled(leaf: jax.Array, piece: jax.Array, at: jax.Array) -> jax.Array:
    start = [*at, *[0] * piece.ndim]
    return jax.lax.dynamic_update_slice(leaf, piece.reshape((1,) * at.shape[0] + piece.shape), start)


def export(table: Table, tree: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, one after the other."""
    leaves = flat(tree)
    for entry in entries(table, tree):
        parts = [part.theirs(np.asarray(leaves[part.leaf][at])) for part, at in entry.places]
        yield entry.name, np.ascontiguousarray(np.concatenate(parts, entry.axis) if len(parts) > 1 else parts[0])
