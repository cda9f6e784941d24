"""Eight virtual CPU devices, a compilation cache shared by all runs, parsed absl flags (grain reads them)."""

import fcntl
import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import forks
import jax
import pytest
from absl import flags

from vgjax import experiment, plan
from vgjax.planner import topology
from vgjax.training.program import read_config

ROOT = Path(__file__).parents[1]

topology.environment()  # chips that are absent are compiled for
# The suite compiles far more than it computes. Without LLVM's optimizations it compiles three times faster, and once
# more twice as fast where no fusion makes an MLIR context of its own and LLVM's modules are not split among threads.
FAST = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.version.__version_info__ < (0, 11):  # later ones know no such flag
    FAST += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST}"
os.environ["PJRT_NPROC"] = "64"  # threads: see program.start
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
CACHE = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "vgjax-test-cache"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE  # the programs that tests start use it too
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
flags.FLAGS.mark_as_parsed()


# One block is enough for runs to differ in, and compiles in half the time, in each process; no sampler is compiled.
SMALL = ["--config.text.blocks=0", "--config.model.refiner_blocks=0", "--config.model.single_blocks=0"]
SMALL += ["--config.train.image_every=0"]


def pytest_collection_finish(session):
    """What is imported stays, and jaxprs are many small objects: walked seldom, they are traced an eighth faster."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_sessionfinish(session):
    forks.end()
    gc.freeze()  # at its end pytest collects garbage five times, which in gigabytes of programs takes a minute


def program(module: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """What `python -m vgjax.<module> args` says and how it ends, from a fork that has its imports."""
    return forks.run(module, args, os.environ | {"JAX_PLATFORMS": "cpu"} | environment, timeout=300)


def python(module: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `python -m vgjax.<module> args` as a user would, for what `program` cannot show."""
    command = [sys.executable, "-m", f"vgjax.{module}", *map(str, args)]
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def started(module: str, *args: str, stdout: Any, stderr: Any, **environment: str) -> forks.Fork:
    """A program to be watched and ended; `stdout` and `stderr` are files, or the first a pipe."""
    return forks.Fork(module, args, os.environ | {"JAX_PLATFORMS": "cpu"} | environment, stdout, stderr)


def planned(*flags: str) -> experiment.Experiment:
    """What `vgjax.plan` would compile of the tiny config, with its flags or the config's."""
    args, rest = plan.parse(["--topology", "none", "--config", "tests/tiny.py:dit", *flags])
    config, _, _ = read_config(["plan", *rest], "", workdir=False)
    return experiment.build(plan.adapt(config, args), plan.vae_of(args))


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with a tiny trained `vae` and `dit`, made once for all workers of a test run."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder) / "trained"
    folder.mkdir(exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arg in ("vae", "dit"):
            if not (folder / f"{arg}.log").exists():
                ran = program("train", "--config", f"tests/tiny.py:{arg}", "--workdir", folder / arg)
                assert ran.returncode == 0, ran.stderr[-2000:]
                (folder / f"{arg}.log").write_text(ran.stdout)
    return folder
