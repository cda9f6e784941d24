"""Exact resume: kill a training at a random moment, start it again, compare the final state with an undisturbed run.

    python benchmarks/kills.py --kills 100 --jobs 2
    python benchmarks/kills.py --kills 4 --seed 1
    python benchmarks/kills.py --kills 20 --processes 2

Each trial starts `vgjax.train` on a tiny config, sends SIGKILL at a moment drawn uniformly over the life of an
undisturbed process (imports, compilation, steps, saves), starts the same command again and compares the sha256 of the
whole final state: parameters, moments, EMA, step, counters. With several processes a random one is killed, and
`launch/local.py`, which started them, ends and restarts the job by itself. A run that is over before its moment comes
is no kill. Writes benchmarks/results/kills.json, kills_<processes>.json, kills_seed_<seed>.json.
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


class Run:
    """`vgjax.train` in one or several processes, all that it says kept."""

    def __init__(self, workdir: Path, arg: str, processes: int) -> None:
        flags = ["--config", f"tests/tiny.py:{arg}", "--workdir", str(workdir), *LONGER]
        start = ["-m", "vgjax.train"]
        if processes > 1:
            start = ["launch/local.py", str(processes), "--grace", "0.5", "vgjax.train"]
            flags += ["--config.layout.kind=fsdp", f"--config.layout.devices={processes}"]
        self.said = workdir.with_suffix(".log")
        self.processes, self.began = processes, time.perf_counter()
        with self.said.open("w") as log:
            command = [sys.executable, *start, *flags]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)

    def kill_at(self, moment: float, rank: int) -> bool:
        """SIGKILL to one process `moment` seconds after the start; False if the run was over by then."""
        try:
            self.process.wait(moment)
            return False
        except subprocess.TimeoutExpired:
            pid = self.process.pid
        if self.processes > 1:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if len(children) < self.processes:
                return False
            pid = int(children[rank])
        os.kill(pid, signal.SIGKILL)
        return self.processes > 1 or self.process.wait() == -signal.SIGKILL

    def finish(self) -> tuple[str, float]:
        """(final state digest, seconds since the start)."""
        code = self.process.wait()
        said = self.said.read_text()
        if code:
            raise RuntimeError(f"exit code {code}: {said[-1500:]}")
        return re.search(r"state digest (\w{64})", said)[1], time.perf_counter() - self.began


def trial(folder: Path, moment: float, rank: int, processes: int) -> tuple[str, str | None]:
    """(digest after a kill at `moment` seconds and a restart, newest step at the kill; None if the run was over)."""
    folder.mkdir()
    for part in ("vae", "data", "latents"):
        os.symlink(folder.parent / "base" / part, folder / part)
    run = Run(folder / "dit", "dit", processes)
    killed = run.kill_at(moment, rank)
    saved = sorted(path.name for path in (folder / "dit" / "checkpoints").glob("*"))
    if processes == 1:
        run = Run(folder / "dit", "dit", processes)
    digest, _ = run.finish()
    if processes > 1 and killed:
        assert "starting all again" in run.said.read_text(), "the launcher did not notice the kill"
    shutil.rmtree(folder)
    return digest, (saved[-1] if saved else "none") if killed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1, help="of each trial's job")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        Run(base / "vae", "vae", 1).finish()
        Run(base / "dit", "dit", 1).finish()  # writes the latents
        shutil.rmtree(base / "dit")
        want, _ = Run(base / "dit", "dit", args.processes).finish()  # fills the compilation cache
        shutil.rmtree(base / "dit")
        _, life = Run(base / "dit", "dit", args.processes).finish()
        moments = [(rng.uniform(0, life), rng.randrange(args.processes), args.processes) for _ in range(args.kills)]
        with ThreadPoolExecutor(args.jobs) as pool:
            trials = pool.map(lambda i: trial(Path(folder) / f"trial_{i}", *moments[i]), range(args.kills))
            digests, saved = zip(*trials, strict=True)
    hit = [digest == want for digest, step in zip(digests, saved, strict=True) if step is not None]
    names = [step for step in saved if step is not None]
    result = {
        "trials": args.kills,
        "processes": args.processes,
        "killed_before_the_end": len(hit),
        "bit_identical": sum(hit),
        "life_seconds": round(life, 2),
        "newest_step_at_the_kill": {name: names.count(name) for name in sorted(set(names))},
    }
    of_seed = f"_seed_{args.seed}" if args.seed else ""
    write("kills" + (f"_{args.processes}" if args.processes > 1 else "") + of_seed, result)
    sys.exit(not all(hit))


if __name__ == "__main__":
    main()
