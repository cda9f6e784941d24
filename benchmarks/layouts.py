"""What does a train step cost in each layout, on the devices of this machine?

    python benchmarks/layouts.py [--config configs/mmdit.py:2b --batch 8 --frames 17 --size 256x256] [--layouts fsdp,tp]

Without accelerators, on eight virtual CPU devices: then only the memory and the ratios between layouts mean something,
since all devices share the same cores. Each layout runs in a process of its own, in turns; the best median of `ROUNDS`
counts. Writes benchmarks/results/layouts_<chip>.json and .png: step time, MFU, the bytes of a device as the compiler
plans them and, where the chip counts them, as they were at their peak.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from matplotlib.figure import Figure
from record import RESULTS, ROOT, write

from vgjax import experiment, plan
from vgjax.nn.codec import LatentStats
from vgjax.parallel import layouts, sharding
from vgjax.planner import flops
from vgjax.training import program, state, step

ROUNDS, STEPS, WARM = 2, 4, 1
SMALL = ["--config", str(ROOT / "configs/mmdit.py:s"), "--batch", "8", "--frames", "17", "--size", "64x64"]
SMALL += ["--config.tokenizer.length=48"]  # else most tokens would be text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", default=",".join(layouts.LAYOUTS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if not any(arg.startswith("--config") for arg in rest):
        rest = [*SMALL, *rest]
    if args.one:
        print(json.dumps(measure(args.one, rest)))
        return
    kinds = args.layouts.split(",")
    rows = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind in kinds:
            rows[kind].append(child(kind, rest))
    best = [min(rows[kind], key=lambda row: row["step_ms"]) for kind in kinds]
    name = "layouts_" + best[0].pop("chip").lower().replace(" ", "_")
    figures = {"asked": [arg.replace(f"{ROOT}/", "") for arg in rest], "rows": best}
    draw(best, write(name, figures).with_suffix(".png"))


def child(kind: str, rest: list[str]) -> dict:
    environment = {"JAX_NUM_CPU_DEVICES": "8", **os.environ}
    command = [sys.executable, __file__, "--one", kind, *rest]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def measure(kind: str, argv: list[str]) -> dict:
    program.start()
    args, rest = plan.parse(["--topology", "none", *argv])
    config, _, _ = program.read_config([sys.argv[0], *rest], "see --help", workdir=False)
    config = plan.adapt(experiment.resolve(config, Path("runs/layouts")), args)
    config.layout.kind = kind
    layout, mesh = layouts.find(kind, 0)
    built = experiment.build(config, plan.vae_of(args))
    channels = built.vae.latent_channels
    frozen = {"stats": LatentStats(np.zeros(channels, np.float32), np.ones(channels, np.float32))}
    players, accumulate = experiment.players(config.optim, config.train.steps, built.objective.players)
    model_flops = plan.model_flops(built, "train")
    with sharding.use(layout, mesh):
        batch = sharding.place(random_batch(built), layout, mesh)
        example = jax.eval_shape(built.objective.prepare, frozen, batch)
        abstract, init = state.builder(built.objective, players, config.seed, example, layout, mesh)
        train = step.make(built.objective, players, abstract, accumulate)
        memory = train.lower(abstract, frozen, batch).compile().memory_analysis()
        now, seconds = init(), []
        for _ in range(WARM + STEPS):
            start = time.perf_counter()
            now, metrics = train(now, frozen, batch)
            jax.block_until_ready((now, metrics))
            seconds.append(time.perf_counter() - start)
    precision = np.dtype(experiment.compute_dtype(config.precision)).name
    median, peak = float(np.median(seconds[WARM:])), flops.peak(jax.devices()[0].device_kind, precision)
    seen = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "layout": kind,
        "mesh": dict(mesh.shape),
        "step_ms": round(1e3 * median, 1),
        "samples_per_second": round(config.train.batch / median, 2),
        "model_tflops_per_second": round(model_flops / median / 1e12, 3),
        "mfu": round(model_flops / median / (peak * mesh.size), 3) if peak else None,
        "state_mib_a_device": round(memory.argument_size_in_bytes / 2**20, 1),
        "temporary_mib_a_device": round(memory.temp_size_in_bytes / 2**20, 1),
        "peak_mib_a_device": round(seen / 2**20, 1) if seen else None,
        "chip": jax.devices()[0].device_kind,
    }


def random_batch(built: experiment.Experiment) -> dict[str, np.ndarray]:
    """Latents of noise and captions of random words, in the shapes of the config."""
    rng = np.random.default_rng(0)
    fill = {
        "float32": lambda shape: rng.standard_normal(shape, np.float32),
        "int32": lambda shape: rng.integers(2, built.conditioner.tokenizer.vocab, shape, np.int32),
        "bool": lambda shape: np.ones(shape, bool),
        "uint32": lambda shape: np.arange(*shape, dtype=np.uint32),
    }
    abstract = plan.abstract_batch(built, built.config.train.batch)
    return jax.tree.map(lambda leaf: fill[np.dtype(leaf.dtype).name](leaf.shape), abstract)


def draw(rows: list[dict], path: Path) -> None:
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [row["layout"] for row in rows]
    left.bar(names, [row["step_ms"] for row in rows])
    left.set_ylabel("step, ms")
    state_mib = [row["state_mib_a_device"] for row in rows]
    right.bar(names, state_mib, label="state")
    right.bar(names, [row["temporary_mib_a_device"] for row in rows], bottom=state_mib, label="temporaries")
    right.set_ylabel("MiB a device")
    right.legend()
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=45)
    figure.savefig(RESULTS / path.name, dpi=120)


if __name__ == "__main__":
    main()
