"""How fast do open weights load, and how much memory does it take?

    python benchmarks/convert.py [--gigabytes 2]

A Wan-shaped pipeline with one transformer of that size and random bf16 weights is written as diffusers publishes it,
then converted in a process of its own. Beside the time for it stands that of reading the same files once (`cat`, warm),
and beside the peak of the host's memory that of a process which has only started JAX, and what is aimed at: that and
the model and twice its largest tensor. Writes benchmarks/results/convert_cpu.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from record import ROOT, write

from vgjax import published, sharding, weights
from vgjax.families.store import abstract
from vgjax.models import crossdit

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
        read, _ = timed("cat", *files)
        _, idle = timed(sys.executable, "-c", START)
        whole, peak = timed(
            sys.executable, "-m", "vgjax.convert", "--from", Path(folder) / "published", "--to", Path(folder) / "out"
        )
    row = {
        "model_gb": size / 1e9,
        "largest_tensor_gb": largest / 1e9,
        "seconds": round(whole, 1),
        "mb_per_second": round(size / 1e6 / whole),
        "cat_mb_per_second": round(size / 1e6 / read),
        "peak_gb": round(peak / 1e9, 2),
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

    def entries(config: dict) -> list[weights.Entry]:
        model = crossdit.CrossDiT(**crossdit.published(config))
        return weights.entries(crossdit.weights(model), sharding.unboxed(abstract(model, crossdit)))

    one, two = (2 * sum(np.prod(e.shape) for e in entries(config | {"num_layers": n})) for n in (1, 2))
    config["num_layers"] = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
    found = entries(config)
    sizes = {entry.name: int(2 * np.prod(entry.shape)) for entry in found}
    random = np.random.default_rng(0)
    tensors = ((e.name, random.standard_normal(e.shape, np.float32).astype(ml_dtypes.bfloat16)) for e in found)
    published.write(folder / "transformer", "diffusion_pytorch_model", config, tensors, sizes)
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return int(sum(sizes.values())), int(max(sizes.values()))


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
