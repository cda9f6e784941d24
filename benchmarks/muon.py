"""What does Muon cost in a step of the quickstart's MM-DiT, as optax has it and as `training/orthogonal.py` has it?

    python benchmarks/muon.py

The steps of all optimizers are made in turns by one process, so that a noisy machine is as noisy for each. Both forms
of Muon make three iterations and give the same updates but for rounding. Writes benchmarks/results/muon_cpu.json:
medians in milliseconds.
"""

import numpy as np
from optax.contrib import muon
from record import write
from step import ready

from vgjax.training import optimizers

STEPS = 25


def main() -> None:
    rate = optimizers.schedule("cosine", 4e-3, 50, 4000)
    kinds = {
        "optax": muon(
            rate,
            ns_steps=3,
            weight_decay_mask=optimizers.decay_mask,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=optimizers.hidden_matrices,
        ),
        "ours": optimizers.muon(rate, iterations=3),
        "adamw": optimizers.adamw(rate),
    }
    steps = {name: ready(lambda config: None, optimizer) for name, optimizer in kinds.items()}
    times = [{name: advance() for name, advance in steps.items()} for _ in range(STEPS)][3:]
    rows = {name: round(1e3 * float(np.median([row[name] for row in times])), 1) for name in kinds}
    write("muon_cpu", {"step_ms": rows, "gain": round(float(np.median([r["optax"] / r["ours"] for r in times])), 2)})


if __name__ == "__main__":
    main()
