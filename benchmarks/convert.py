"""How fast do open weights load, and how much memory does it take?

    python benchmarks/convert.py [--gigabytes 2]

A Wan-shaped pipeline with one transformer of that size and random bf16 weights is written as diffusers publishes it,
then converted and exported again, each in a process of its own. Beside the time stands what the disk and the checksum
alone take (the same bytes read, written, fsynced and hashed, one after the other) and how long a process needs that has
only started JAX and our modules; beside the peak of the host's memory that of this process, and what is aimed at: that
and the model and twice its largest tensor. Writes benchmarks/results/convert_cpu.json.
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from record import ROOT, write

from vgjax.open import folders, tables
from vgjax.open.published import crossdit
from vgjax.open.store import abstract
from vgjax.parallel import sharding

DIM = 2048
START = "import jax, vgjax.convert; jax.devices()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        print(json.dumps(make(Path(args.make), args.gigabytes)))
        return
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        # In a process of its own: a child's peak begins with its parent's.
        command = [
            sys.executable,
            __file__,
            "--gigabytes",
            str(args.gigabytes),
            "--make",
            str(Path(folder) / "published"),
        ]
        size, largest = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        files = sorted((Path(folder) / "published" / "transformer").glob("*.safetensors"))
        plain = copied(files, Path(folder) / "plain")
        start, idle = timed(sys.executable, "-c", START)
        convert = (sys.executable, "-m", "vgjax.convert")
        whole, peak = timed(*convert, "--from", Path(folder) / "published", "--to", Path(folder) / "out")
        back, peak_back = timed(*convert, "--from", Path(folder) / "out", "--to", Path(folder) / "exported", "--export")
    row = {
        "model_gb": size / 1e9,
        "largest_tensor_gb": largest / 1e9,
        "seconds": round(whole, 1),
        "mb_per_second": round(size / 1e6 / whole),
        "start_seconds": round(start, 1),
        "plain_seconds": round(plain, 1),
        "plain_mb_per_second": round(size / 1e6 / plain),
        "of_plain": round(plain / (whole - start), 2),
        "export_seconds": round(back, 1),
        "peak_gb": round(peak / 1e9, 2),
        "export_peak_gb": round(peak_back / 1e9, 2),
        "idle_gb": round(idle / 1e9, 2),
        "allowed_gb": round((size + 2 * largest + idle) / 1e9, 2),
    }
    write("convert_cpu", row)


def make(folder: Path, gigabytes: float) -> tuple[int, int]:
    """(bytes, bytes of the largest tensor) of a pipeline with a transformer alone."""
    config = dict(
        _class_name="WanTransformer3DModel", num_attention_heads=16, attention_head_dim=DIM // 16, ffn_dim=4 * DIM,
        in_channels=16, out_channels=16, text_dim=4096, patch_size=(1, 2, 2), num_layers=1,
    )  # fmt: skip

    def entries(config: dict) -> list[tables.Entry]:
        model = crossdit.CrossDiT(**crossdit.published(config))
        return tables.entries(crossdit.weights(model), sharding.unboxed(abstract(model, crossdit)))

    one, two = (2 * sum(np.prod(e.shape) for e in entries(config | {"num_layers": n})) for n in (1, 2))
    config["num_layers"] = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
    found = entries(config)
    shapes = {entry.name: (entry.shape, "bfloat16") for entry in found}
    sizes = [2 * math.prod(entry.shape) for entry in found]
    random = np.random.default_rng(0)
    tensors = ((e.name, random.standard_normal(e.shape, np.float32).astype(ml_dtypes.bfloat16)) for e in found)
    folders.write(folder / "transformer", "diffusion_pytorch_model", config, tensors, shapes)
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return sum(sizes), max(sizes)


def copied(files: list[Path], to: Path) -> float:
    """Seconds for the same bytes read, written, fsynced and hashed."""
    start, buffer = time.perf_counter(), memoryview(bytearray(2**24))
    with open(to, "wb", buffering=0) as out:
        for file in files:
            with open(file, "rb", buffering=0) as source:
                while count := source.readinto(buffer):
                    out.write(buffer[:count])
        os.fsync(out.fileno())
    with open(to, "rb") as out:
        hashlib.file_digest(out, "sha256")
    seconds = time.perf_counter() - start
    to.unlink()
    return seconds


def timed(*command: object) -> tuple[float, int]:
    """(seconds, bytes of resident memory at its peak) of a process."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    child = subprocess.Popen([*map(str, command)], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, f"{command[0]} ended with {os.waitstatus_to_exitcode(status)}"
    return time.perf_counter() - start, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
