"""Layouts: a mesh shape and the rules from logical names to mesh axes.

The only file that knows the mesh axes: `data` (replicas), `fsdp` (replicas that shard the state), `sequence` (tokens),
`tensor` (heads and MLP). A rule is dropped where a dim does not divide, so tiny parameters stay replicated.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, PartitionSpec

from vgjax.errors import UserError

AXES = ("data", "fsdp", "sequence", "tensor")
Rules = tuple[tuple[str, tuple[str, ...]], ...]
BATCH: Rules = (("batch", ("data", "fsdp")),)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh shape (one entry may be -1: all remaining devices) and logical rules."""

    data: int = 1
    fsdp: int = 1
    sequence: int = 1
    tensor: int = 1
    rules: Rules = BATCH

    def mesh(self, devices: Sequence[jax.Device]) -> Mesh:
        """The named mesh over `devices`; a UserError where the shape does not fit them."""
        sizes = [getattr(self, axis) for axis in AXES]
        known = math.prod(size for size in sizes if size != -1)
        if len(devices) % known or (-1 not in sizes and known != len(devices)):
            shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
            raise UserError(f"layout ({shape}) does not fit {len(devices)} devices: set config.layout.devices")
        sizes = [len(devices) // known if size == -1 else size for size in sizes]
        return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def spec(self, names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
        """The PartitionSpec of a dim list; an axis is used once, and only where the dim divides."""
        rules, used, out = dict(self.rules), set(), []
        for name, size in zip(names, shape, strict=True):
            axes = tuple(axis for axis in rules.get(name, ()) if axis not in used and mesh.shape[axis] > 1)
            if axes and size % math.prod(mesh.shape[axis] for axis in axes) == 0:
                used.update(axes)
                out.append(axes if len(axes) > 1 else axes[0])
            else:
                out.append(None)
        return PartitionSpec(*out)


LAYOUTS = {
    "dp": Layout(data=-1),
    "fsdp": Layout(fsdp=-1, rules=(*BATCH, ("embed", ("fsdp",)), ("mlp", ("fsdp",)), ("conv_out", ("fsdp",)))),
}


def find(kind: str, devices: int = 0) -> tuple[Layout, Mesh]:
    """A layout by name on the first `devices` devices (0: all of them)."""
    if kind not in LAYOUTS:
        raise UserError(f"config.layout.kind={kind!r} is unknown: use one of {', '.join(LAYOUTS)}")
    present = jax.devices()
    if devices > len(present):
        raise UserError(
            f"config.layout.devices={devices} asks for more devices than the {len(present)} "
            f"{present[0].platform} device(s) here: use 0 for all of them"
        )
    return LAYOUTS[kind], LAYOUTS[kind].mesh(present[: devices or len(present)])
