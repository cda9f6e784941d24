"""What does a step of the quickstart's MM-DiT cost on a CPU, and what do kept memory and a shorter Newton-Schulz save?

    python benchmarks/step.py

Each form runs in a process of its own, in turns, so that the ratios survive a noisy machine; the median step of the
best of `ROUNDS` counts. `glibc` is the allocator's default, `kept` what `launch/environment.sh` sets (`keep_memory`); 5
iterations are Muon's default, 3 the quickstart's. Writes benchmarks/results/step_cpu.json: milliseconds and page faults
a step.
"""

import json
import os
import re
import resource
import subprocess
import sys
import time

import jax
import numpy as np
from ml_collections import ConfigDict
from record import ROOT, write

from vgjax import experiment
from vgjax.nn.codec import LatentStats
from vgjax.parallel import layouts, sharding
from vgjax.training import state, step
from vgjax.typing import Context, Tokens

ROUNDS, STEPS = 3, 12
FORMS = (("glibc", 5), ("kept", 5), ("kept", 3))


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
        return
    rows = {form: [] for form in FORMS}
    for _ in range(ROUNDS):
        for form in FORMS:
            rows[form].append(child(*form))
    best = [dict(memory=memory, iterations=count, **min(rows[memory, count], key=cost)) for memory, count in FORMS]
    for row in best:
        row["gain"] = round(best[0]["step_ms"] / row["step_ms"], 2)
    write("step_cpu", {"rows": best})


def cost(row: dict) -> float:
    return row["step_ms"]


def child(memory: str, iterations: int) -> dict:
    kept = re.search(r"GLIBC_TUNABLES-([^}]+)}", (ROOT / "launch" / "environment.sh").read_text())[1]
    environment = {**os.environ, "GLIBC_TUNABLES": kept if memory == "kept" else ""}
    command = [sys.executable, __file__, str(iterations)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def measure(iterations: int) -> dict:
    sys.path.insert(0, str(ROOT / "configs"))
    import quickstart

    config = quickstart.get_config("dit")
    config.optim.iterations = iterations
    vae = ConfigDict({"model": quickstart.get_config("vae").model})
    built = experiment.build(config, vae)
    batch, length = config.train.batch, config.tokenizer.length
    shape = built.vae.latent_shape(config.data.frames, *config.data.size)
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 100, (batch, length, built.conditioner.tokenizer.hashes), np.int32)
    raw = {
        "latent": rng.standard_normal((batch, *shape), np.float32),
        "context": Context({"text": Tokens(ids, np.ones((batch, length), bool))}),
        "index": np.arange(batch, dtype=np.uint32),
    }
    frozen = {"vae": {}, "stats": LatentStats(np.zeros(shape[-1], np.float32), np.ones(shape[-1], np.float32))}
    layout, mesh = layouts.find("dp", 1)
    players, accumulate = experiment.players(config.optim, config.train.steps, built.objective.players)
    with sharding.use(layout, mesh):
        example = jax.eval_shape(built.objective.prepare, frozen, raw)
        abstract, init = state.builder(built.objective, players, config.seed, example, layout, mesh)
        train, now = step.make(built.objective, players, abstract, accumulate), init()
        times = []
        for i in range(STEPS + 3):
            if i == 3:
                faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            now, metrics = train(now, frozen, raw)
            jax.block_until_ready((now, metrics))
            times.append(time.perf_counter() - start)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    return {"step_ms": round(1e3 * float(np.median(times[3:])), 1), "page_faults": faults // STEPS}


if __name__ == "__main__":
    main()
