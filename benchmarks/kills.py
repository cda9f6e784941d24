"""Exact resume: kill a training at a random moment, start it again, compare the final state with an undisturbed run.

    python benchmarks/kills.py --kills 100 --jobs 2

Each trial starts `vgjax.train` on a tiny config, sends SIGKILL at a moment drawn uniformly over the life of an
undisturbed process (imports, compilation, steps, saves), starts the same command again and compares the sha256 of the
whole final state: parameters, moments, EMA, step, counters. Writes benchmarks/results/kills.json.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from record import ROOT, write

LONGER = ["--config.train.steps=24", "--config.train.save_every=2"]


def command(workdir: Path, arg: str = "dit") -> list[str]:
    config = ["--config", f"tests/tiny.py:{arg}", "--workdir", str(workdir)]
    return [sys.executable, "-m", "vgjax.train", *config, *LONGER]


def finish(workdir: Path, arg: str = "dit") -> tuple[str, float]:
    """(final state digest, seconds) of a run to its end."""
    start = time.perf_counter()
    ran = subprocess.run(command(workdir, arg), cwd=ROOT, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"exit code {ran.returncode}: {ran.stderr[-1500:]}")
    return re.search(r"state digest (\w{64})", ran.stdout)[1], time.perf_counter() - start


def trial(folder: Path, moment: float) -> tuple[str, str | None]:
    """(digest after a kill at `moment` seconds and a restart, newest step at the kill; None if the run was over)."""
    folder.mkdir()
    for part in ("vae", "data", "latents"):
        os.symlink(folder.parent / "base" / part, folder / part)
    victim = subprocess.Popen(command(folder / "dit"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        killed = victim.wait(moment) is None
    except subprocess.TimeoutExpired:
        victim.kill()
        killed = victim.wait() == -signal.SIGKILL
    saved = sorted(path.name for path in (folder / "dit" / "checkpoints").glob("*"))
    digest, _ = finish(folder / "dit")
    shutil.rmtree(folder)
    return digest, (saved[-1] if saved else "none") if killed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        finish(base / "vae", "vae")
        want, _ = finish(base / "dit")  # fills the compilation cache and writes the latents
        shutil.rmtree(base / "dit")
        _, life = finish(base / "dit")
        moments = [rng.uniform(0, life) for _ in range(args.kills)]
        with ThreadPoolExecutor(args.jobs) as pool:
            trials = pool.map(trial, [Path(folder) / f"trial_{i}" for i in range(args.kills)], moments)
            digests, saved = zip(*trials, strict=True)
    hit = [digest == want for digest, step in zip(digests, saved, strict=True) if step is not None]
    names = [step for step in saved if step is not None]
    result = {
        "trials": args.kills,
        "killed_before_the_end": len(hit),
        "bit_identical": sum(hit),
        "life_seconds": round(life, 2),
        "newest_step_at_the_kill": {name: names.count(name) for name in sorted(set(names))},
    }
    write("kills", result)
    sys.exit(not all(hit))


if __name__ == "__main__":
    main()
