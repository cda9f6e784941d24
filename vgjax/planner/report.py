"""The rows of a plan, one a layout: which is the best, as a table for people, as JSON and as a picture."""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vgjax.planner.topology import Topology

GIB = 2**30
STATE = "for what lives between steps alone"  # why a row was not compiled


@dataclasses.dataclass(frozen=True)
class Row:
    """One layout. Bytes are of one device, seconds of one step (or one batch sampled)."""

    layout: str
    mesh: dict[str, int]
    batch: int
    fits: bool
    reason: str = ""
    needed: float = 0.0
    available: float = 0.0
    params: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    model_flops: float = 0.0
    flops: float = 0.0
    traffic: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    compute_seconds: float = 0.0
    memory_seconds: float = 0.0
    network_seconds: float = 0.0
    step_seconds: float = 0.0
    mfu: float = 0.0
    tokens_per_second: float = 0.0
    compile_seconds: float = 0.0


def rank(row: Row) -> tuple[bool, float, float]:
    """The best first: what fits, the most tokens a second; of equals what overlaps less that may not overlap wholly."""
    return not row.fits, -float(f"{row.tokens_per_second:.3g}"), row.memory_seconds + row.network_seconds


def best(rows: list[Row]) -> tuple[Row | None, str]:
    """The layout to take, and why."""
    fitting = sorted((row for row in rows if row.fits), key=rank)
    if not fitting:
        wanting = (row for row in rows if row.needed)
        small = min(wanting, key=lambda row: (row.reason == STATE, row.needed), default=None)  # compiled ones first
        if small is None:
            return None, "no layout was planned: " + "; ".join(sorted({row.reason for row in rows}))
        what = f"the smallest, {small.layout}, {needs(small)}"
        return None, f"no layout fits; {what}: take more chips, a smaller batch or more remat"
    first = fitting[0]
    times = {"arithmetic": first.compute_seconds, "memory": first.memory_seconds, "network": first.network_seconds}
    bound = max(times, key=lambda name: times[name])
    than = ""
    if fitting[1:]:
        second = fitting[1]
        than = f", {first.tokens_per_second / second.tokens_per_second:.2f}x those of {second.layout}"
        if rank(first)[:2] == rank(second)[:2]:
            than = f", as many as {second.layout}, with less memory and network traffic beside the arithmetic"
    return first, f"{first.layout}: the most tokens a second of those that fit{than}; bound by {bound}"


def needs(row: Row) -> str:
    """Of what does not fit."""
    return f"needs {row.needed / GIB:.1f} of {row.available / GIB:.1f} GiB{f' {STATE}' * (row.reason == STATE)}"


def table(rows: list[Row], config: ConfigDict, where: Topology, args: argparse.Namespace) -> list[str]:
    """Lines for people."""
    data = config.data
    head = f"{len(where.devices)} devices of {args.slices} x {where.name}" if args.slices > 1 else where.name
    lines = [
        f"{args.job} on {head}: {data.frames} frames of {data.size[0]}x{data.size[1]}; "
        f"a device has {rows[0].available / GIB:.1f} GiB",
        f"{'layout':9} {'mesh':12} {'batch':>6} {'GiB':>6} {'params':>6} {'optim':>6} {'activ':>6} | {'TFLOP':>8} "
        f"{'sent GiB':>8} | {'compute':>8} {'memory':>8} {'network':>8} | {'step s':>7} {'MFU':>5} {'tokens/s':>9}",
    ]
    for row in sorted(rows, key=rank):
        sizes = "x".join(str(size) for size in row.mesh.values())
        gib = [f"{size / GIB:6.1f}" for size in (row.needed, row.params, row.optimizer, row.activations)]
        if not row.step_seconds:
            lines.append(f"{row.layout:9} {sizes:12} {row.batch:6} {needs(row) if row.needed else row.reason}")
            continue
        times = " ".join(f"{t:8.3f}" for t in (row.compute_seconds, row.memory_seconds, row.network_seconds))
        lines.append(
            f"{row.layout:9} {sizes:12} {row.batch:6} {' '.join(gib)} | {row.model_flops / 1e12:8.1f} "
            f"{sum(row.collectives.values()) / GIB:8.2f} | {times} | {row.step_seconds:7.3f} {100 * row.mfu:4.0f}% "
            f"{row.tokens_per_second:9,.0f}" + ("" if row.fits else f"   needs {gib[0].strip()} GiB: does not fit")
        )
    return [
        *lines,
        "measured by the compiler: GiB, activations, bytes sent; modelled: seconds (each part at the chip's peak, "
        "overlapped), so the step is a lower bound and MFU an upper one",
        best(rows)[1],
    ]


def write(out: Path, rows: list[Row], config: ConfigDict, where: Topology, args: argparse.Namespace) -> None:
    """plan.json, plan.txt and plan.png; of the config what a plan reads."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    chosen, why = best(rows)
    record = {
        "topology": where.name,
        "slices": args.slices,
        "devices": len(where.devices),
        "job": args.job,
        "config": {name: part for name, part in config.to_dict().items() if name not in ("vae", "latents", "weights")},
        "rows": [dataclasses.asdict(row) for row in rows],
        "best": chosen.layout if chosen else None,
        "reason": why,
        "measured": ["fits", "needed", "activations", "collectives"],
        "modelled": ["compute_seconds", "memory_seconds", "network_seconds", "step_seconds", "mfu"],
    }
    (out / "plan.json").write_text(json.dumps(record, indent=1))
    (out / "plan.txt").write_text("\n".join(table(rows, config, where, args)) + "\n")
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6))
    names, places = [row.layout for row in rows], np.arange(len(rows))
    bottom = np.zeros(len(rows))
    for part in ("params", "optimizer", "activations"):
        heights = np.array([getattr(row, part) / GIB for row in rows])
        axes[0].bar(places, heights, bottom=bottom, label=part)
        bottom += heights
    axes[0].axhline(rows[0].available / GIB, color="black", linestyle="--", linewidth=1)
    axes[0].set(title="memory of a device, GiB (dashed: what it has)", xticks=places)
    for i, part in enumerate(("compute", "memory", "network")):
        axes[1].bar(places + 0.27 * (i - 1), [getattr(row, f"{part}_seconds") for row in rows], 0.25, label=part)
    axes[1].set(title="seconds of a step, each part at its peak", xticks=places)
    for axis in axes:
        axis.set_xticklabels(names, rotation=30)
        axis.set_ylim(0, 1.2 * max(bar.get_y() + bar.get_height() for bar in axis.patches) or 1)  # room for the legend
        axis.legend(frameon=False, ncols=3, loc="upper center")
    figure.tight_layout()
    figure.savefig(out / "plan.png", dpi=110)
