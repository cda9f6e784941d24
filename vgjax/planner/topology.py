"""Devices that are not there: `v5p:4x4x4`, `v6e:16x16` or `h100:64`, for the compilers to compile for.

TPU slices come from libtpu (extra `tpu`), GPUs from the CUDA plugin (extra `cuda`); neither needs the chip.
"""

import dataclasses
import importlib.util
import os
import re

from vgjax.errors import UserError
from vgjax.planner import chips
from vgjax.planner.chips import Chip
from vgjax.typing import Config

# name: (name in `chips.CHIPS`, dims of a slice)
TPUS = {
    "v4": ("TPU v4", 3),
    "v5e": ("TPU v5e", 2),
    "v5p": ("TPU v5", 3),
    "v6e": ("TPU v6", 2),
    "tpu7x": ("TPU7x", 3),
}
# Most of the TPU compiler's time goes into the code of each operation, of which a plan reads nothing, and once more for
# each set of collectives that it joins into one. With less of that the bytes sent stay, and memory is a few percent
# more or less: benchmarks/README.md has the difference.
QUICK = {
    "exec_time_optimization_effort": -1.0,
    "xla_jf_crs_combiner_threshold_count": 1,
    "xla_jf_crs_combiner_threshold_in_bytes": 65536,
}
GPUS = {"h100": "H100", "h200": "H200"}
NODE = 8  # GPUs that share NVLink
# A card as the CUDA compiler wants to know it (SXM, compute capability 9.0).
CARD = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
 cuda_compute_capability {{ major: 9 minor: 0 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
 platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}
 device_description_str: "NVIDIA {name}" """


@dataclasses.dataclass(frozen=True)
class Topology:
    """`devices` to build a mesh of; `near` of them share the fast network (a TPU slice, a GPU node).

    `refuses`: its compiler itself knows what is too large. `quick`: options with which it takes less time for a plan.
    """

    name: str
    devices: tuple[object, ...]
    chip: Chip
    near: int
    refuses: bool = False
    quick: Config = dataclasses.field(default_factory=dict)


def environment() -> None:
    """What must be set before JAX starts, so that the compilers load without their chips."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TPU_LIBRARY_LOG_LEVEL": "3"}
    # What a TPU's own machine would say: libtpu warns at length where none does, and compiles for any chip anyway.
    for name, value in (("TPU_ACCELERATOR_TYPE", "v5p-8"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"


def find(name: str, slices: int = 1) -> Topology:
    """The topology of a name; UserError for an unknown one, or where the extra that compiles for it is missing."""
    kind, _, shape = name.partition(":")
    if kind in TPUS and re.fullmatch(r"\d+(x\d+)" + f"{{{TPUS[kind][1] - 1}}}", shape):
        return _tpu(kind, shape, slices)
    if kind in GPUS and shape.isdigit() and int(shape):
        return _gpu(kind, int(shape))
    known = [f"{kind}:{'x'.join('4' * dims)}" for kind, (_, dims) in TPUS.items()] + [f"{kind}:8" for kind in GPUS]
    raise UserError(f"--topology {name} is unknown: write it like one of {', '.join(known)}")


def _tpu(kind: str, shape: str, slices: int) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"planning for {kind} needs the TPU compiler: pip install 'vgjax[tpu]'")
    from jax.experimental import topologies

    try:
        more = {"num_slices": slices} if slices > 1 else {}
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **more)
    except Exception as error:  # the compiler's own words, of whatever type
        raise UserError(f"--topology {kind}:{shape}: the TPU compiler knows no such slice: {error}") from error
    devices = tuple(found.devices)
    near = len(devices) // slices
    return Topology(f"{kind}:{shape}", devices, chips.CHIPS[TPUS[kind][0]], near, refuses=True, quick=QUICK)


def _gpu(kind: str, count: int) -> Topology:
    if importlib.util.find_spec("jax_cuda12_plugin") is None and importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(f"planning for {kind} needs the CUDA compiler: pip install 'vgjax[cuda]'")
    if count > NODE and count % NODE:
        raise UserError(f"--topology {kind}:{count}: more than {NODE} cards come in nodes of {NODE}")
    from jax.experimental import topologies

    name = GPUS[kind]
    chip = chips.CHIPS[name]
    hosts, each = (count // NODE, NODE) if count > NODE else (1, count)
    card = CARD.format(name=name, memory=int(chip.memory), bandwidth=int(chip.bandwidth))
    found = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=card, topology=f"1x{hosts}x{each}"
    )
    return Topology(f"{kind}:{count}", tuple(found.devices), chip, each)
