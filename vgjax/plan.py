"""Plans a run for chips you don't have: `python -m vgjax.plan --config configs/mmdit.py:13b --topology v5p:4x4x4`.

For each layout the real train step (or sampler) is compiled by the real TPU or GPU compiler. Measured by the compiler:
whether it fits, the bytes of a device, which collectives run and how large they are. Modelled by us, from those and the
table of chips: the time for arithmetic, memory and network, each at its peak and perfectly overlapped. So step times
are lower bounds and MFU an upper bound; the ranking of layouts is what they are for.
"""

import argparse
import dataclasses
import functools
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vgjax import experiment, flops, hlo, layouts, program, sample, sharding, state, step, topology
from vgjax.errors import UserError, door
from vgjax.nn.codec import LatentStats
from vgjax.topology import Topology
from vgjax.typing import PyTree

USAGE = "usage: python -m vgjax.plan --config configs/mmdit.py:13b --topology v5p:4x4x4 [--layouts all] [--out DIR]"
GIB = 2**30
# A quickly compiled program wants some percent more or less memory than the one that runs: one that wants between these
# parts of what a device has is compiled once more as for a run.
CLOSE = (0.95, 1.1)
Where = tuple[layouts.Layout, Mesh] | None


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


@dataclasses.dataclass(frozen=True)
class Job:
    """A lowered program, what it keeps on the devices, its FLOPs with padding and recomputation, and its tokens."""

    lowered: Any
    state: state.TrainState | None
    params: PyTree
    flops: float
    tokens: int


@door
def main(argv: list[str]) -> None:
    args, rest = parse(argv[1:])
    config, _, _ = program.read_config([argv[0], *rest], USAGE, workdir=False)
    config = adapt(experiment.resolve(config, Path("runs/plan")), args)
    config.precision = "bfloat16" if config.precision == "auto" else config.precision  # that of absent accelerators
    kinds = list(layouts.LAYOUTS) if args.layouts == "all" else (args.layouts or config.layout.kind).split(",")
    for kind in kinds:
        layouts.named(kind)
    where = topology.find(args.topology, args.slices)
    rows = []
    for kind in kinds:
        rows.append(plan(config, kind, where, args))
        print(f"{kind}: {rows[-1].compile_seconds:.0f} s of compiling", file=sys.stderr, flush=True)
    print("\n".join(table(rows, config, where, args)))
    if args.out:
        write(program.workdir(args.out), rows, config, where, args)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser("python -m vgjax.plan", description="Plans a run for chips you don't have.")
    parser.add_argument("--topology", required=True, help="v4:, v5p:, tpu7x:4x4x4, v5e:, v6e:16x16, h100:, h200:8")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices of that shape")
    parser.add_argument("--layouts", default="", help="all, or names with commas between; default: the config's")
    parser.add_argument("--job", default="train", choices=("train", "sample"))
    parser.add_argument("--batch", type=int, help="samples a step, default: the config's")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--size", help="HxW in pixels")
    parser.add_argument("--vae", default="4x8x8", help="size of the causal VAE whose latents are trained on")
    parser.add_argument("--search", action="store_true", help="find the largest batch that fits, for each layout")
    parser.add_argument("--exact", action="store_true", help="compile as for a run: TPUs take three times as long")
    parser.add_argument("--out", help="folder for plan.json and plan.png")
    return parser.parse_known_args(argv)


def adapt(config: ConfigDict, args: argparse.Namespace) -> ConfigDict:
    """The config with what the command line asks of it."""
    if config.objective.get("kind") not in ("flow", "finetune"):
        raise UserError(f"--config: plan is for flows, not for a {config.objective.get('kind')}")
    with config.unlocked():
        config.train.batch = args.batch or config.train.batch
        config.data.frames = args.frames or config.data.frames
        config.data.size = program.size_of(args.size) or tuple(config.data.size)
    return config


def vae_of(args: argparse.Namespace) -> ConfigDict:
    """The config of the VAE whose latents are trained on."""
    return ConfigDict({"model": {"kind": "causal_vae", "size": args.vae}})


def plan(config: ConfigDict, kind: str, where: Topology, args: argparse.Namespace) -> Row:
    """One layout, at the config's batch or, with --search, at the largest that fits."""
    if not args.search:
        return compiled(config, kind, where, args)
    unit = unit_of(config, *mesh_of(config, kind, where))

    @functools.cache
    def at(units: int) -> Row:
        return compiled(changed(config, "train", batch=units * unit), kind, where, args)

    first = units = max(1, config.train.batch // unit)
    low, high = 0, None
    while high is None or high - low > max(1, low // 8):
        low, high = (units, high) if at(units).fits else (low, units)
        units = 2 * units if high is None else (low + high) // 2
        if units == 0 or units > 64 * first:
            break
    return at(low or 1)


def changed(config: ConfigDict, section: str, **values: Any) -> ConfigDict:
    """A copy with other values in a section."""
    plain = config.to_dict()
    return ConfigDict({**plain, section: {**plain[section], **values}})


def mesh_of(config: ConfigDict, kind: str, where: Topology) -> tuple[layouts.Layout, Mesh]:
    """The layout and its mesh; axes that the config asks for are those of the config's own layout."""
    layout = layouts.named(kind)
    asked = {axis: config.layout.get(axis, 0) for axis in layouts.AXES} if kind == config.layout.kind else {}
    return layout, layout.mesh(where.devices, **asked)


def unit_of(config: ConfigDict, layout: layouts.Layout, mesh: Mesh) -> int:
    """What must divide the batch: the devices over which it is spread, the steps over which it is accumulated."""
    return math.lcm(math.prod(mesh.shape[axis] for axis in layout.axes("batch", mesh)), config.optim.accumulate)


def compiled(config: ConfigDict, kind: str, where: Topology, args: argparse.Namespace) -> Row:
    """Compiles the job under a layout and reads off what it costs."""
    layout, mesh = mesh_of(config, kind, where)
    available = where.chip.memory / where.chip.devices
    row = Row(kind, dict(mesh.shape), config.train.batch, False, available=available)
    unit = unit_of(config, layout, mesh)
    if config.train.batch % unit:
        near = max(1, round(config.train.batch / unit)) * unit
        return dataclasses.replace(row, reason=f"batch {config.train.batch} does not divide into {unit}: try {near}")
    start = time.perf_counter()
    built = experiment.build(changed(config, "layout", kind=kind), vae_of(args))
    row = dataclasses.replace(row, model_flops=model_flops(built, args.job))
    with sharding.use(layout, mesh):
        job = (train_job if args.job == "train" else sample_job)(built, (layout, mesh))
        row = dataclasses.replace(row, **memory_of_state(job))
        quick = {} if args.exact else where.quick
        done = attempt(row, job, quick, mesh, where)
        unsure = not done.needed or CLOSE[0] < done.needed / done.available < CLOSE[1]
        if quick and unsure:
            done = attempt(row, job, {}, mesh, where)
    return dataclasses.replace(done, compile_seconds=time.perf_counter() - start)


def attempt(row: Row, job: Job, options: Mapping[str, Any], mesh: Mesh, where: Topology) -> Row:
    """The row of the program compiled with these options, or with what the compiler says against it."""
    try:
        done = job.lowered.compile(dict(options))
    except Exception as error:  # the compilers have no type of their own for "too large"
        return dataclasses.replace(row, **refusal(error, row))
    return measured(row, done, job, mesh, where)


def model_flops(built: experiment.Experiment, job: str) -> float:
    """What the mathematics needs, without padding or recomputation; traced with no layout active."""
    function, inputs = (training if job == "train" else sampling)(built)
    forward = flops.count(function, *inputs)
    return forward if job == "sample" else flops.training(forward, built.adapted)


def training(built: experiment.Experiment) -> tuple[Callable[..., Any], tuple[PyTree, ...]]:
    """(loss, abstract inputs) of one step on latents."""
    objective = built.objective
    example = jax.eval_shape(objective.prepare, frozen_of(built), abstract_batch(built, built.config.train.batch))
    boxed = jax.eval_shape(lambda batch: objective.init(jax.random.key(0), batch)["velocity"], example)
    params = sharding.unboxed(boxed)

    def loss(own: PyTree, batch: PyTree, key: Any) -> Any:
        return objective.loss("velocity", own, batch, key)[0]

    return loss, ({**frozen_of(built), "velocity": params}, example, jax.eval_shape(lambda: jax.random.key(0)))


def train_job(built: experiment.Experiment, where: Where) -> Job:
    """The train step of `vgjax.train` on latents."""
    config, objective = built.config, built.objective
    batch = abstract_batch(built, config.train.batch, where)
    example = jax.eval_shape(objective.prepare, frozen_of(built), batch)
    optimizer, of_step = experiment.optimizer(config.optim, config.train.steps)
    abstract, _ = state.builder(objective, optimizer, config.seed, example, *where)
    frozen = frozen_of(built, where)
    traced = step.make(objective, optimizer, abstract, **of_step).trace(abstract, frozen, batch)
    count, m = example["mask"].shape
    tokens = count * (objective.model.tokens(example["x"].shape[1:4]) + m)
    kept = {**abstract.params, "base": frozen.get("base", {})}
    return Job(traced.lower(), abstract, kept, flops.traced(traced.jaxpr.jaxpr), tokens)


def sampling(built: experiment.Experiment, where: Where = None) -> tuple[Callable[..., Any], tuple[PyTree, ...]]:
    """(integration of a batch, abstract inputs): all steps, guidance included, without the decoder."""
    config, settings = built.config, sample.settings_of(built.config)
    shape = built.vae.latent_shape(config.data.frames, *config.data.size)
    texts = abstract_batch(built, config.train.batch * (2 if settings.cfg != 1.0 else 1), where)
    params = sharding.abstract(sample.wanted(built), where) | base_of(built, where)
    index = jax.ShapeDtypeStruct((config.train.batch,), np.uint32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    integrated = functools.partial(sample.integrated, built.objective, settings, shape)
    return integrated, (params, texts["text"], texts["mask"], index, key)


def sample_job(built: experiment.Experiment, where: Where) -> Job:
    """The sampler of `vgjax.sample`."""
    integrated, inputs = sampling(built, where)
    tokens = built.config.train.batch * built.objective.model.tokens(integrated.args[2][:3])
    traced = sample.integrated.trace(*integrated.args, *inputs)
    return Job(traced.lower(), None, inputs[0], flops.traced(traced.jaxpr.jaxpr), tokens)


def base_of(built: experiment.Experiment, where: Where = None) -> dict[str, PyTree]:
    """What is frozen under adapters: the model, as published."""
    return {"base": sharding.abstract(built.objective.base(), where, jnp.bfloat16)} if built.adapted else {}


def frozen_of(built: experiment.Experiment, where: Where = None) -> PyTree:
    """What a flow on latents needs beside what learns."""
    stats = jax.ShapeDtypeStruct((built.vae.latent_channels,), jnp.float32)
    return {"stats": LatentStats(stats, stats)} | base_of(built, where)


def abstract_batch(built: experiment.Experiment, count: int, where: Where = None) -> dict[str, Any]:
    """A batch of latents and tokens as the loader would place it."""
    data = built.config.data
    latent = jax.ShapeDtypeStruct((count, *built.vae.latent_shape(data.frames, *data.size)), jnp.float32)
    batch = built.texts(count) | {"latent": latent, "index": jax.ShapeDtypeStruct((count,), jnp.uint32)}

    def one(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not where:
            return leaf
        layout, mesh = where
        spec = layout.spec(("batch", *[None] * (leaf.ndim - 1)), leaf.shape, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, batch)


def bytes_of(tree: PyTree) -> float:
    """Bytes of one device's part of an abstract tree."""
    leaves = jax.tree.leaves(tree)
    return float(sum(np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def memory_of_state(job: Job) -> dict[str, float]:
    if job.state is None:
        return {"params": bytes_of(job.params)}
    return {"params": bytes_of(job.params), "optimizer": bytes_of((job.state.opt, job.state.ema))}


def refusal(error: Exception, row: Row) -> dict[str, Any]:
    """What the compiler says against a program: too large, or its first line."""
    text = str(error)
    number = r"([\d.]+)([KMGT]?)"
    found = re.search(rf"Used {number} of {number} hbm", text) or re.search(
        rf"required for [\w ]+ \({number}\) exceeds available HBM \({number}\)", text
    )
    if found is None:
        return {"reason": next((line for line in text.splitlines() if line.strip()), type(error).__name__)[:300]}
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
    needed, available = float(found[1]) * scale[found[2]], float(found[3]) * scale[found[4]]
    return {"needed": needed, "available": available, "reason": "too large"}


def measured(row: Row, done: Any, job: Job, mesh: Mesh, where: Topology) -> Row:
    """The row of a program that compiled."""
    memory, text = done.memory_analysis(), hlo.parse(done.as_text())
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # What the TPU compiler refuses a program by is its peak; on a GPU the temporaries are one piece.
    needed = float(memory.peak_memory_in_bytes if where.refuses else kept + memory.temp_size_in_bytes)
    kinds: Counter[str] = Counter()
    network = 0.0
    for collective in text.collectives():
        kinds[collective.kind] += collective.sent * collective.times
        far = len({device // where.near for device in collective.group}) > 1
        speed = (where.chip.network if far else where.chip.link) / where.chip.devices
        network += collective.sent * collective.times / speed
    chip, devices = where.chip, mesh.size
    peak, traffic = chip.peak / chip.devices, text.traffic()
    compute = job.flops / devices / peak
    memory_time = traffic / (chip.bandwidth / chip.devices)
    total = max(compute, memory_time, network)
    fits = where.refuses or needed <= row.available
    return dataclasses.replace(
        row,
        fits=fits,
        reason="" if fits else "too large",
        needed=needed,
        activations=needed - kept,
        flops=job.flops,
        traffic=traffic,
        collectives={kind: float(sent) for kind, sent in kinds.items()},
        compute_seconds=compute,
        memory_seconds=memory_time,
        network_seconds=network,
        step_seconds=total,
        mfu=row.model_flops / devices / peak / total,
        tokens_per_second=job.tokens / total,
    )


def rank(row: Row) -> tuple[bool, float, float]:
    """The best first: what fits, the most tokens a second; of equals what overlaps less that may not overlap wholly."""
    return not row.fits, -float(f"{row.tokens_per_second:.3g}"), row.memory_seconds + row.network_seconds


def best(rows: list[Row]) -> tuple[Row | None, str]:
    """The layout to take, and why."""
    fitting = sorted((row for row in rows if row.fits), key=rank)
    if not fitting:
        small = min((row for row in rows if row.needed), key=lambda row: row.needed, default=None)
        what = f"; the smallest, {small.layout}, needs {small.needed / GIB:.1f} GiB" if small else ""
        return None, f"no layout fits{what}: take more chips, a smaller batch or more remat"
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
            why = f"needs {gib[0].strip()} of {row.available / GIB:.1f} GiB" if row.needed else row.reason
            lines.append(f"{row.layout:9} {sizes:12} {row.batch:6} {why}")
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
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out / "plan.png", dpi=110)


if __name__ == "__main__":
    topology.environment()
    program.start(absent=True)
    main()
