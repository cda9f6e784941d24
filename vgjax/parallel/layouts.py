"""Layouts: a mesh shape, the rules from logical names to mesh axes, and the attention that goes with them.

The only file that knows the mesh axes: `data` (replicas, across slices), `fsdp` (replicas that share the state),
`sequence` (tokens), `tensor` (heads and MLP).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from vgjax.attention.full import Full
from vgjax.attention.parallel import Parallel
from vgjax.attention.ring import Ring
from vgjax.attention.ulysses import Ulysses
from vgjax.errors import UserError
from vgjax.typing import Attention

AXES = ("data", "fsdp", "sequence", "tensor")
REST = -1  # the size of an axis that takes all devices which the others leave
# Pairs of a logical name and axes, the most important first: each gives its axes to the dims of its name that have none
# yet, as many of them (from the left) as are free and divide the dim. So tiny parameters stay whole.
Rules = tuple[tuple[str, tuple[str, ...]], ...]
BATCH: Rules = (("batch", ("data", "fsdp")),)
HEADS: Rules = (("heads", ("tensor",)), ("mlp", ("tensor",)))


def state(*axes: str) -> Rules:
    """Parameters, moments and EMA over `axes`, along whichever dim divides."""
    return tuple((name, axes) for name in ("embed", "mlp", "conv_out", "conv_in", "vocab", "head_dim"))


def tokens(*axes: str) -> Rules:
    """Video tokens, and the width of a VAE's pictures, over `axes`."""
    return (("tokens", axes), ("width", axes))


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes, the rules, and how attention meets the tokens of other devices.

    A size is REST, or the most that the axis takes by itself: the largest part of it that divides the devices.
    """

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    rules: Rules = BATCH
    attention: Callable[[], Attention] = lambda: Parallel(Full())

    def shape(self, devices: int, slices: int = 1, **asked: int) -> dict[str, int]:
        """The size of each axis; a UserError where an `asked` size (0: unasked) does not fit.

        Every slice is a replica of its own: its devices are shared among the other axes, and `data` counts them all.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES} | {axis: size for axis, size in asked.items() if size}
        rest = next((axis for axis in AXES if sizes[axis] == REST), "data")
        left = devices // slices
        for axis in ("tensor", "sequence", "fsdp", "data"):
            if axis == rest:
                continue
            size = sizes[axis] // slices if axis == "data" and asked.get(axis) else sizes[axis]
            if not asked.get(axis):
                size = math.gcd(size, left)
            elif size < 1 or left % size or (axis == "data" and sizes[axis] % slices):
                raise UserError(
                    f"config.layout.{axis}={sizes[axis]} does not divide the {left * (slices if axis == 'data' else 1)}"
                    f" devices left to it: the nearest that do are {_nearest(left, sizes[axis])}"
                )
            sizes[axis] = size
            left //= size
        if rest == "data" and asked.get("data") and asked["data"] != left * slices:
            raise UserError(
                f"config.layout.data={asked['data']}: the other axes leave {left * slices} devices, not that"
            )
        sizes[rest] = left
        return {**sizes, "data": sizes["data"] * slices}

    def mesh(self, devices: Sequence[jax.Device], **asked: int) -> Mesh:
        """The named mesh over `devices`, neighbours on a torus where there is one; `data` runs across slices."""
        # A GPU's "slice" is its host: what network lies between hosts is no reason to keep replicas apart.
        tpus = devices[0].platform == "tpu"
        slices = len({getattr(device, "slice_index", 0) for device in devices}) if tpus else 1
        sizes = self.shape(len(devices), slices, **asked)
        inner, outer = [sizes[axis] for axis in AXES], [slices, 1, 1, 1]
        inner[0] //= slices
        if slices > 1:
            grid = mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def spec(self, names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
        """The PartitionSpec of dims by their logical names; an axis is used once, and only where it divides."""
        used: set[str] = set()
        out: list[tuple[str, ...]] = [()] * len(shape)
        for name, axes in self.rules:
            for i, (dim, size) in enumerate(zip(names, shape, strict=True)):
                if dim != name or out[i]:
                    continue
                free = [axis for axis in axes if axis not in used and mesh.shape[axis] > 1]
                while free and size % math.prod(mesh.shape[axis] for axis in free):
                    free.pop()
                out[i] = tuple(free)
                used.update(free)
        return PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in out))

    def unsplit(
        self, names: Sequence[str | None], shape: Sequence[int], mesh: Mesh
    ) -> tuple[tuple[str, int], str] | None:
        """((dim, its size), axis) where the rules give these dims an axis that divides none of them, or None."""
        spec = self.spec(names, shape, mesh)
        used = {axis for part in spec for axis in ((part,) if isinstance(part, str) else part or ())}
        for name, axes in self.rules:
            if name == "heads":  # attention pads those that do not divide
                continue
            for axis in axes:
                if name in names and axis not in used and mesh.shape[axis] > 1:
                    return (name, shape[list(names).index(name)]), axis
        return None

    def axes(self, name: str, mesh: Mesh) -> tuple[str, ...]:
        """The axes over which a dim of this name is spread, where it divides."""
        first = dict(reversed(self.rules)).get(name, ())
        return tuple(axis for axis in first if mesh.shape[axis] > 1)


class Placement(NamedTuple):
    """Where arrays lie: a layout on a mesh."""

    layout: Layout
    mesh: Mesh


LAYOUTS = {
    "dp": Layout(data=REST),
    "fsdp": Layout(fsdp=REST, rules=(*BATCH, *state("fsdp"))),
    "hsdp": Layout(data=2, fsdp=REST, rules=(*BATCH, *state("fsdp"))),
    "tp": Layout(data=REST, tensor=8, rules=(*BATCH, *HEADS)),
    "fsdp_tp": Layout(fsdp=REST, tensor=4, rules=(*BATCH, *HEADS, *state("fsdp"))),
    # Sequence layouts spread the state over the devices of a sequence too: they hold the same weights.
    "ulysses": Layout(
        fsdp=REST,
        sequence=8,
        rules=(*BATCH, *tokens("sequence"), *state("fsdp", "sequence")),
        attention=lambda: Parallel(Ulysses(Full(), "sequence")),
    ),
    "ring": Layout(
        fsdp=REST,
        sequence=8,
        rules=(*BATCH, *tokens("sequence"), *state("fsdp", "sequence")),
        attention=lambda: Parallel(Ring("sequence")),
    ),
    # Unified sequence parallelism (Fang & Zhao 2024, arXiv:2405.07719): Ulysses among neighbours, a ring of them.
    "usp": Layout(
        fsdp=REST,
        sequence=2,
        tensor=4,
        rules=(*BATCH, *tokens("sequence", "tensor"), *state("fsdp", "sequence", "tensor")),
        attention=lambda: Parallel(Ulysses(Ring("sequence"), "tensor")),
    ),
}


def find(kind: str, devices: int = 0, data: int = 0, fsdp: int = 0, sequence: int = 0, tensor: int = 0) -> Placement:
    """A layout by name on the first `devices` devices (0: all of them), with its own axis sizes or other ones."""
    present = jax.devices()
    if devices > len(present):
        raise UserError(
            f"config.layout.devices={devices} asks for more devices than the {len(present)} "
            f"{present[0].platform} device(s) here: use 0 for all of them"
        )
    layout = named(kind)
    chosen = present[: devices or len(present)]
    if len({device.process_index for device in chosen}) < jax.process_count():
        raise UserError(
            f"config.layout.devices={devices} leaves some of the {jax.process_count()} processes without a device: use "
            "0 for all of them"
        )
    return Placement(layout, layout.mesh(chosen, data=data, fsdp=fsdp, sequence=sequence, tensor=tensor))


def named(kind: str) -> Layout:
    """The layout of this name."""
    if kind not in LAYOUTS:
        raise UserError(f"config.layout.kind={kind!r} is unknown: use one of {', '.join(LAYOUTS)}")
    return LAYOUTS[kind]


def _nearest(whole: int, size: int) -> str:
    """The divisors of `whole` next to `size`."""
    divisors = [n for n in range(1, whole + 1) if whole % n == 0]
    return " and ".join(map(str, sorted(sorted(divisors, key=lambda n: abs(n - size))[:2])))
