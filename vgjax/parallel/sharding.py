"""Logical names to shardings: where parameters and activations live on the mesh.

A parameter carries the logical names of its dims in a small metadata box (`named`); an activation says them at a
`shard` call. The active `Layout` maps names to mesh axes. With no layout active everything here is the identity, so
models run unchanged on one device, in a notebook or in a test.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vgjax.errors import UserError
from vgjax.typing import Array, Dtype, PyTree

LARGE = 16 * 2**20  # bytes: what a layout fails to split is an error above this


@runtime_checkable
class Specs(Protocol):
    """What is asked of a layout."""

    def spec(self, names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
        """Where the dims of an array lie, by their logical names."""

    def unsplit(
        self, names: Sequence[str | None], shape: Sequence[int], mesh: Mesh
    ) -> tuple[tuple[str, int], str] | None:
        """((dim, its size), axis) where an array should be split and cannot be, or None."""


_active: contextvars.ContextVar[tuple[Specs, Mesh] | None] = contextvars.ContextVar("layout", default=None)


class Named(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A parameter and the logical names of its dims.

    Not `nn.LogicallyPartitioned`: that one constrains on `unbox` and breaks under Explicit axes.
    """

    value: PyTree
    names: tuple[str | None, ...] = struct.field(pytree_node=False)

    def unbox(self) -> PyTree:
        return self.value

    def replace_boxed(self, val: PyTree) -> "Named":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict) -> "Named":
        return self.replace(names=(*self.names[:index], params[nn.PARTITION_NAME], *self.names[index:]))

    def remove_axis(self, index: int, params: dict) -> "Named":
        return self.replace(names=(*self.names[:index], *self.names[index + 1 :]))


def named(init: Callable[..., Array], *names: str | None) -> Callable[..., Named]:
    """An initializer whose result carries logical names: `self.param("kernel", named(init, "embed", "mlp"), shape)`."""

    def boxed(*args: object, **kwargs: object) -> Named:
        value = init(*args, **kwargs)
        assert len(names) == value.ndim, f"{len(names)} names {names} for shape {value.shape}"
        return Named(value, names)

    return boxed


@contextlib.contextmanager
def use(layout: Specs, mesh: Mesh) -> Iterator[Mesh]:
    """Makes `layout` on `mesh` the active one; entry points only."""
    token = _active.set((layout, mesh))
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _active.reset(token)


def within(where: tuple[Specs, Mesh] | None) -> contextlib.AbstractContextManager:
    """Makes a placement the active one; with None nothing changes, for one device."""
    return use(*where) if where else contextlib.nullcontext()


@contextlib.contextmanager
def off() -> Iterator[None]:
    """No layout is active: for counting what one device would do."""
    token = _active.set(None)
    try:
        yield
    finally:
        _active.reset(token)


def shard(x: Array, *names: str | None) -> Array:
    """Constrains an activation to the active layout by its logical names; with none active, the identity."""
    active = _active.get()
    if active is None:
        return x
    layout, mesh = active
    assert len(names) == x.ndim, f"{len(names)} names {names} for shape {x.shape}"
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, layout.spec(names, x.shape, mesh)))


def active() -> bool:
    """Whether a layout is active."""
    return _active.get() is not None


def axes(name: str) -> tuple[str, ...]:
    """The mesh axes over which the active layout spreads a dim of this name; none with no layout active."""
    active = _active.get()
    return () if active is None else active[0].axes(name, active[1])


def degree(name: str) -> int:
    """Over how many devices the active layout spreads a dim of this name."""
    return math.prod(_active.get()[1].shape[axis] for axis in axes(name))


def local(function: Callable[..., PyTree], names: Sequence[tuple[str | None, ...]], *arrays: Array) -> Array:
    """`function` on each device's part of the arrays, whose result is split like the first of them.

    One tuple of logical names an array; what has no name, or does not divide, is whole on every device. Inside, the
    axes of the mesh are there for collectives. With no layout active this is a plain call.
    """
    active = _active.get()
    if active is None:
        return function(*arrays)
    layout, mesh = active
    specs = tuple(layout.spec(dims, x.shape, mesh) for dims, x in zip(names, arrays, strict=True))
    # The check would want every constant of a loop's carry to say over which axes it varies.
    return jax.shard_map(function, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)


def is_local() -> bool:
    """Whether arrays are one device's own here: inside `local`, or with no layout active."""
    return not active() or bool(jax.sharding.get_abstract_mesh().manual_axes)


def platform() -> str:
    """The platform the program is being built for: that of the active mesh (chips may be absent), else the default."""
    active = _active.get()
    device = jax.devices()[0] if active is None else active[1].devices.flat[0]
    return {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)


def rows(total: int, layout: Specs, mesh: Mesh) -> tuple[int, int]:
    """(first, end) of the rows of a global batch that this process' devices need."""
    sharding = NamedSharding(mesh, layout.spec(("batch",), (total,), mesh))
    parts = [part[0].indices(total)[:2] for part in sharding.addressable_devices_indices_map((total,)).values()]
    return min(first for first, _ in parts), max(end for _, end in parts)


def place(batch: PyTree, layout: Specs, mesh: Mesh, total: int = 0) -> PyTree:
    """A host batch as global arrays of `total` rows (0: its own), split over the layout's `batch` axes.

    In a job of several processes each brings its `rows` alone.
    """

    def one(leaf: PyTree) -> Array:
        count = total or leaf.shape[0]
        first, _ = rows(count, layout, mesh) if count != leaf.shape[0] else (0, count)
        shape = (count, *leaf.shape[1:])
        sharding = NamedSharding(mesh, layout.spec(("batch",) + (None,) * (leaf.ndim - 1), shape, mesh))

        def part(index: tuple[slice, ...]) -> PyTree:
            start, stop, _ = index[0].indices(count)
            return leaf[start - first : stop - first]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(one, batch)


def put(tree: PyTree, where: PyTree) -> PyTree:
    """The tree, which every process holds, as global arrays of these shardings."""

    def one(leaf: PyTree, at: NamedSharding) -> Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, at, lambda index: host[index])

    return jax.tree.map(one, tree, where)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree, which every process holds, whole on every device of all processes."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return put(tree, jax.tree.map(lambda _: everywhere, tree))


def whole(tree: PyTree, where: tuple[Specs, Mesh] | None) -> PyTree:
    """The tree, which every process holds, whole on every device of a placement, or (None) on one device."""
    return replicate(tree, where[1]) if where else jax.tree.map(jnp.asarray, tree)


def unboxed(tree: PyTree) -> PyTree:
    """The tree without its metadata boxes."""
    return jax.tree.map(lambda leaf: leaf.value if isinstance(leaf, Named) else leaf, tree, is_leaf=_is_box)


def shardings(tree: PyTree, layout: Specs, mesh: Mesh) -> PyTree:
    """NamedShardings of a boxed (abstract) tree, one a leaf of `unboxed(tree)`; leaves without names are replicated.

    A UserError where the layout splits leaves of these names, none of the dims divides, and what stays whole is large.
    """

    def one(path: tuple, leaf: PyTree) -> NamedSharding:
        if not isinstance(leaf, Named):
            return NamedSharding(mesh, PartitionSpec())
        shape, missed = leaf.value.shape, layout.unsplit(leaf.names, leaf.value.shape, mesh)
        at = NamedSharding(mesh, layout.spec(leaf.names, shape, mesh))
        size = math.prod(at.shard_shape(shape)) * leaf.value.dtype.itemsize
        if missed and size > LARGE:
            (dim, length), axis = missed
            raise UserError(
                f"the layout splits {'/'.join(str(getattr(key, 'key', key)) for key in path)} {tuple(shape)} over "
                f"{axis}={mesh.shape[axis]}, which divides none of its dims, not {dim}={length}: {size / 2**20:.0f} "
                f"MiB of it would lie on every device; set config.layout.{axis} to a divisor of {length}"
            )
        return at

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_box)


def abstract(tree: PyTree, where: tuple[Specs, Mesh] | None, dtype: Dtype = None) -> PyTree:
    """A boxed (abstract) tree without its boxes, where (layout, mesh) has it, in a type of its own if one is given."""

    def one(leaf: PyTree, at: NamedSharding | None = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=at)

    return jax.tree.map(one, unboxed(tree), *([shardings(tree, *where)] if where else []))


def _is_box(leaf: PyTree) -> bool:
    return isinstance(leaf, Named)
