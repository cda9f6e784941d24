"""Prompt accuracy over training steps, as a plot.

    python benchmarks/curve.py runs/shapes/dit --name shapes     writes benchmarks/results/<name>_curve.png and .json

Reads `evaluations.jsonl`, which a training with `train.evaluate_every` writes.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from record import RESULTS, write

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--name", default="shapes")
    args = parser.parse_args()
    rows = [json.loads(line) for line in (args.workdir / "evaluations.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for axis, kind in zip(axes, ("held-out prompts", "never-trained combinations"), strict=True):
        for name in ("color", "shape", "motion", "all"):
            width = 2.4 if name == "all" else 1.2
            axis.plot(steps, [row[f"{kind}/{name}"] for row in rows], label=name, linewidth=width)
        axis.set(title=kind, xlabel="step", ylim=(0, 1.02))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of prompts shown")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(RESULTS / f"{args.name}_curve.png", dpi=110)
    write(f"{args.name}_curve", {"evaluations": rows})


if __name__ == "__main__":
    main()
