"""Model FLOPs: closed forms for the MM-DiT, a count for anything that JAX can trace, and the peak of each chip.

A multiply and an add are two FLOPs. Model FLOPs are those the mathematics needs: training is three forwards
(recomputation under remat is not counted), so that MFU = model FLOPs / (seconds * peak) compares across papers.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Dense bf16 peak of one chip in FLOP/s, and how many JAX devices it is. The first name found in `device_kind` counts.
# NVIDIA: the data sheets' tensor-core figures without sparsity ("H100" is the SXM card). TPU: "peak compute per chip
# (bf16)" at cloud.google.com/tpu/docs; a chip is one device from v4 to v6e and two before and after.
CHIPS = {
    "H100 PCIe": (756e12, 1),
    "H100": (989e12, 1),
    "H200": (989e12, 1),
    "B200": (2250e12, 1),
    "A100": (312e12, 1),
    "A10": (125e12, 1),
    "L40S": (362e12, 1),
    "L4": (121e12, 1),
    "TPU v2": (45e12, 2),
    "TPU v3": (123e12, 2),
    "TPU v4 lite": (138e12, 1),
    "TPU v4": (275e12, 1),
    "TPU v5 lite": (197e12, 1),
    "TPU v5e": (197e12, 1),
    "TPU v5": (459e12, 1),
    "TPU v6": (918e12, 1),
    "TPU7x": (2307e12, 2),
    "TPU v7": (2307e12, 2),
}


def peak(device_kind: str, dtype: Any = "bfloat16") -> float | None:
    """Peak matmul FLOP/s of one JAX device (`device.device_kind`); None where it is unknown (CPU, other dtypes).

    float32 is what JAX's default precision does with it: one bf16 pass on TPUs, TF32 (half of bf16) on GPUs.
    """
    dtype = jax.numpy.dtype(dtype).name
    for name, (chip, devices) in CHIPS.items():
        if name in device_kind and dtype in ("bfloat16", "float16", "float32"):
            return chip / devices / (2 if dtype == "float32" and "TPU" not in name else 1)
    return None


def training(forward: float | int) -> float | int:
    """FLOPs of a training step: the backward pass costs two forwards."""
    return 3 * forward


def mmdit_forward(
    dim: int,
    mlp_ratio: float | int,
    double_blocks: int,
    single_blocks: int,
    video_tokens: int,
    text_tokens: int,
    patch_dim: int = 0,
    text_dim: int = 0,
) -> float | int:
    """FLOPs of one MM-DiT forward of one sample; embedders and the output layer count if their widths are given.

    Per token and block, dual or single: QKV and output projections 4 d^2 and the MLP 2 r d^2 weights; attention over
    S = video + text tokens is q k^T and p v, 2 S^2 d multiply-adds a block. Modulation acts on one vector a sample and
    the token refiner on text only: under 0.1 % at the field's sizes, left out.
    """
    tokens = video_tokens + text_tokens
    linear = 2 * (4 + 2 * mlp_ratio) * dim**2 * tokens
    attention = 4 * tokens**2 * dim
    ends = 2 * dim * (2 * patch_dim * video_tokens + text_dim * text_tokens)
    return (double_blocks + single_blocks) * (linear + attention) + ends


def count(fn: Callable[..., Any], *args: Any) -> float:
    """FLOPs of the matmuls and convolutions in `fn(*args)`; arguments may be ShapeDtypeStructs, nothing is computed.

    Loops count every iteration (`while`, whose length is unknown, one), branches the dearest. The padding of a
    convolution counts as work. Kernels that JAX cannot look into (Pallas, cuDNN) count nothing.
    """
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def _count(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        kind, inner = eqn.primitive.name, [_count(sub) for sub in _inner(eqn)]
        if kind == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * eqn.outvars[0].aval.size * depth
        elif kind == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * kernel.size / features
        elif kind == "cond":
            total += max(inner)
        elif kind == "scan":
            total += eqn.params["length"] * sum(inner)
        elif kind == "shard_map":
            total += eqn.params["mesh"].size * sum(inner)
        elif kind != "pallas_call":
            total += sum(inner)
    return total


def _inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs: bodies of loops, branches, calls, remat and custom derivatives."""
    for value in eqn.params.values():
        for candidate in value if isinstance(value, tuple | list) else (value,):
            candidate = getattr(candidate, "jaxpr", candidate)
            if hasattr(candidate, "eqns"):
                yield candidate
