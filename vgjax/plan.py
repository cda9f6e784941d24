"""Plans a run for chips you don't have: `python -m vgjax.plan --config configs/mmdit.py:13b --topology v5p:4x4x4`.

For each layout whose state alone fits, the real train step (or sampler) is compiled by the real TPU or GPU compiler.
Measured by the compiler: whether it fits, the bytes of a device, which collectives run and how large they are. Modelled
by us, from those and the table of chips: the time for arithmetic, memory and network, each at its peak and perfectly
overlapped. So step times are lower bounds and MFU an upper bound; the ranking of layouts is what they are for.
"""

import argparse
import dataclasses
import functools
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from vgjax import experiment
from vgjax.errors import UserError, door
from vgjax.nn.codec import LatentStats
from vgjax.parallel import layouts, sharding
from vgjax.pipeline import trained
from vgjax.pipeline.pipeline import follow
from vgjax.planner import flops, hlo, topology
from vgjax.planner.report import GIB, STATE, Row, table, write
from vgjax.planner.topology import Topology
from vgjax.training import program, state, step
from vgjax.typing import Array, Config, Json, Key, PyTree

USAGE = "usage: python -m vgjax.plan --config configs/mmdit.py:13b --topology v5p:4x4x4 [--layouts all] [--out DIR]"
# A quickly compiled program wants some percent more or less memory than the one that runs: one that wants between these
# parts of what a device has is compiled once more as for a run.
CLOSE = (0.95, 1.1)
Where = layouts.Placement | None


@dataclasses.dataclass(frozen=True)
class Job:
    """A program that is traced and lowered when it is asked for, what it keeps on the devices, and its tokens."""

    trace: Callable[[], jax.stages.Traced]
    state: state.TrainState | None
    params: PyTree
    tokens: int

    @functools.cached_property
    def traced(self) -> jax.stages.Traced:
        return self.trace()

    @functools.cached_property
    def lowered(self) -> jax.stages.Lowered:
        return self.traced.lower()

    @functools.cached_property
    def flops(self) -> float:
        """Of all devices, padding and recomputation included."""
        return flops.traced(self.traced.jaxpr.jaxpr)


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
        row = compiled(changed(config, "train", batch=units * unit), kind, where, args)
        print(f"{kind} at batch {row.batch}: {'fits' if row.fits else row.reason}", file=sys.stderr, flush=True)
        return row

    first = units = max(1, config.train.batch // unit)
    low, high = 0, None
    while high is None or high - low > max(1, low // 8):
        low, high = (units, high) if at(units).fits else (low, units)
        units = 2 * units if high is None else (low + high) // 2
        if units == 0 or units > 64 * first:
            break
    return at(low or 1)


def changed(config: ConfigDict, section: str, **values: object) -> ConfigDict:
    """A copy with other values in a section."""
    plain = config.to_dict()
    return ConfigDict({**plain, section: {**plain[section], **values}})


def mesh_of(config: ConfigDict, kind: str, where: Topology) -> layouts.Placement:
    """The layout and its mesh; axes that the config asks for are those of the config's own layout."""
    layout = layouts.named(kind)
    asked = {axis: config.layout.get(axis, 0) for axis in layouts.AXES} if kind == config.layout.kind else {}
    return layouts.Placement(layout, layout.mesh(where.devices, **asked))


def unit_of(config: ConfigDict, layout: layouts.Layout, mesh: Mesh) -> int:
    """What must divide the batch: each of the micro-batches is spread over all devices of the batch."""
    return math.prod(mesh.shape[axis] for axis in layout.axes("batch", mesh)) * config.optim.get("accumulate", 1)


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
        try:
            job = (train_job if args.job == "train" else sample_job)(built, layouts.Placement(layout, mesh))
        except UserError as refused:  # a leaf that this layout cannot split
            return dataclasses.replace(row, reason=str(refused))
        row = dataclasses.replace(row, **memory_of_state(job))
        quick = {} if args.exact else where.quick
        if not args.exact and row.params + row.optimizer > available:  # whatever a compiler makes of the rest
            return dataclasses.replace(row, needed=row.params + row.optimizer, reason=STATE)
        done = attempt(row, job, quick, mesh, where)
        unsure = not done.needed or CLOSE[0] < done.needed / done.available < CLOSE[1]
        if quick and unsure:
            done = attempt(row, job, {}, mesh, where)
    return dataclasses.replace(done, compile_seconds=time.perf_counter() - start)


def attempt(row: Row, job: Job, options: Config, mesh: Mesh, where: Topology) -> Row:
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
    return forward if job == "sample" else flops.training(forward, built.objective.adapted)


def training(built: experiment.Experiment) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
    """(loss, abstract inputs) of one step on latents."""
    objective = built.objective
    example = jax.eval_shape(objective.prepare, frozen_of(built), abstract_batch(built, built.config.train.batch))
    boxed = jax.eval_shape(lambda batch: objective.init(jax.random.key(0), batch)["velocity"], example)
    params = sharding.unboxed(boxed)

    def loss(own: PyTree, batch: PyTree, key: Key) -> Array:
        return objective.loss("velocity", own, batch, key)[0]

    return loss, ({**frozen_of(built), "velocity": params}, example, jax.eval_shape(lambda: jax.random.key(0)))


def train_job(built: experiment.Experiment, where: Where) -> Job:
    """The train step of `vgjax.train` on latents."""
    config, objective = built.config, built.objective
    batch = abstract_batch(built, config.train.batch, where)
    example = jax.eval_shape(objective.prepare, frozen_of(built), batch)
    players, accumulate = experiment.players(config.optim, config.train.steps, objective.players)
    abstract, _ = state.builder(objective, players, config.seed, example, *where)
    frozen = frozen_of(built, where)
    count, text = example["x"].shape[0], example["context"].tokens
    tokens = count * (objective.model.tokens(example["x"].shape[1:4]) + text)
    kept = {**abstract.params, "base": frozen.get("base", {})}
    made = step.make(objective, players, abstract, accumulate)
    return Job(functools.partial(made.trace, abstract, frozen, batch), abstract, kept, tokens)


def sampling(built: experiment.Experiment, where: Where = None) -> tuple[Callable[..., PyTree], tuple[PyTree, ...]]:
    """(integration of a batch, abstract inputs): all steps, guidance included, without the decoder."""
    config, objective, use = built.config, built.objective, trained.settings_of(built.config)
    scale, count = use.cfg[0], config.train.batch  # of two experts the first
    context = abstract_batch(built, count * (2 if scale != 1.0 else 1), where)["context"]
    params = sharding.abstract(trained.wanted(built), where) | base_of(built, where)
    x = abstract_batch(built, count, where)["latent"]
    times = jax.ShapeDtypeStruct((use.steps + 1,), jnp.float32)
    keys = jax.ShapeDtypeStruct((count, 2), jnp.uint32)
    integrated = functools.partial(follow, trained.Bound(objective), use, scale)
    return integrated, (params, context, x, keys, None, times, None)


def sample_job(built: experiment.Experiment, where: Where) -> Job:
    """The sampler of `vgjax.sample`."""
    integrated, inputs = sampling(built, where)
    count, *grid, _ = inputs[2].shape
    trace = functools.partial(follow.trace, *integrated.args, *inputs)
    return Job(trace, None, inputs[0], count * built.objective.tokens(tuple(grid)))


def base_of(built: experiment.Experiment, where: Where = None) -> dict[str, PyTree]:
    """What is frozen under adapters: the model, as published."""
    return {"base": sharding.abstract(built.objective.base(), where, jnp.bfloat16)} if built.objective.adapted else {}


def frozen_of(built: experiment.Experiment, where: Where = None) -> PyTree:
    """What a flow on latents needs beside what learns."""
    stats = jax.ShapeDtypeStruct((built.vae.latent_channels,), jnp.float32)
    return {"stats": LatentStats(stats, stats)} | base_of(built, where)


def abstract_batch(built: experiment.Experiment, count: int, where: Where = None) -> Json:
    """A batch of latents and tokens as the loader would place it."""
    data = built.config.data
    latent = jax.ShapeDtypeStruct((count, *built.vae.latent_shape(data.frames, *data.size)), jnp.float32)
    batch = {"latent": latent, "index": jax.ShapeDtypeStruct((count,), jnp.uint32)}
    batch["context"] = built.conditioner.abstract(count)

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


def refusal(error: Exception, row: Row) -> Json:
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
    activations = max(0.0, needed - row.params - row.optimizer)
    return {"needed": needed, "available": available, "activations": activations, "reason": "too large"}


def measured(row: Row, done: jax.stages.Compiled, job: Job, mesh: Mesh, where: Topology) -> Row:
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


if __name__ == "__main__":
    topology.environment()
    program.start(absent=True)
    main()
