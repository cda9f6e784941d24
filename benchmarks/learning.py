"""Which choices make a small model learn what captions say?

    python benchmarks/learning.py runs/quickstart [steps]

After a quickstart its MM-DiT learns again on the same latents, for fewer steps (default 1000), once as configured and
once with each choice undone: words as bytes, the preconditioned velocity as the plain one. Held-out velocity loss by
timestep bin, and how many held-out prompts come out with the right colour and motion: a model that stays on the plateau
where only colour is right has motion near chance, 25 %. Writes benchmarks/results/learning.json.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import ROOT, write

CHOICES = {
    "as configured": [],
    "bytes": ["--config.tokenizer.kind=bytes", "--config.tokenizer.length=72"],
    "plain velocity": ["--config.objective.precondition=False"],
}


def main() -> None:
    source = Path(sys.argv[1]).absolute()
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            learn(name, flags, source, Path(folder) / str(i), steps) for i, (name, flags) in enumerate(CHOICES.items())
        ]
    write("learning", {"steps": steps, "rows": rows})


def learn(name: str, flags: list[str], source: Path, workdir: Path, steps: int) -> dict:
    paths = {"vae": source / "vae", "latents": source / "latents", "data.path": source / "data"}
    run(
        *("vgjax.train", "--config", "configs/quickstart.py:dit", "--workdir", workdir, *flags),
        *(f"--config.{key}={path}" for key, path in paths.items()),
        *(f"--config.train.{key}={steps}" for key in ("steps", "save_every", "image_every")),
    )
    run("vgjax.evaluate", "--checkpoint", workdir)
    scores = json.loads((workdir / "evaluation.json").read_text())
    log = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    shown = scores["held-out prompts"]
    return {
        "name": name,
        "step_ms": round(1e3 * min(row["step_seconds"] for row in log), 1),
        **{key: round(value, 4) for key, value in scores["loss"].items()},
        **{key: shown[key] for key in ("color", "motion", "shape", "all")},
    }


def run(*command: object) -> None:
    print("+ python -m", *command, flush=True)
    subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
