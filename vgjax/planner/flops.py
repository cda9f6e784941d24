"""Model FLOPs: closed forms for the MM-DiT, a count for anything that JAX can trace, and peaks.

A multiply and an add are two FLOPs. Model FLOPs are those the mathematics needs: training is three forwards
(recomputation under remat is not counted), so that MFU = model FLOPs / (seconds * peak) compares across papers.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.interpreters import partial_eval

from vgjax.planner import chips
from vgjax.typing import Dtype, PyTree


def peak(device_kind: str, dtype: Dtype = "bfloat16") -> float | None:
    """Peak matmul FLOP/s of one JAX device (`device.device_kind`); None where it is unknown (CPU, other dtypes).

    float32 is what JAX's default precision does with it: one bf16 pass on TPUs, TF32 (half of bf16) on GPUs.
    """
    dtype = jax.numpy.dtype(dtype).name
    chip = chips.find(device_kind)
    if chip is None or dtype not in ("bfloat16", "float16", "float32"):
        return None
    return chip.peak / chip.devices / (2 if dtype == "float32" and "TPU" not in device_kind else 1)


def training(forward: float | int, adapted: bool = False) -> float | int:
    """FLOPs of a training step: the backward pass costs two forwards, one where adapters alone learn (at least)."""
    return (2 if adapted else 3) * forward


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


def count(fn: Callable[..., PyTree], *args: PyTree) -> float:
    """FLOPs of the matmuls and convolutions in `fn(*args)`; arguments may be ShapeDtypeStructs, nothing is computed.

    Loops count every iteration (`while`, whose length is unknown, one), of a `cond` what runs where it holds. The
    padding of a convolution counts as work. A Pallas kernel counts its body at every place of its grid, cuDNN's
    attention its two matmuls forward and five backward.
    """
    return traced(jax.make_jaxpr(fn)(*args).jaxpr)


def traced(jaxpr: Any) -> float:
    """The same of a function that was traced already: `jax.jit(fn).trace(*args).jaxpr.jaxpr`.

    What nobody reads is not counted, as it is not compiled: the backward pass of a rematerialized block holds all of
    its forward pass at first, with what was saved.
    """
    live, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return _sum(live)


def _sum(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        kind, inner = eqn.primitive.name, [_sum(sub) for sub in _inner(eqn)]
        if kind == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * eqn.outvars[0].aval.size * depth
        elif kind == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * kernel.size / features
        elif kind == "cond":
            total += inner[-1]
        elif kind == "scan":
            total += eqn.params["length"] * sum(inner)
        elif kind == "shard_map":
            total += eqn.params["mesh"].size * sum(inner)
        elif kind == "pallas_call":
            total += math.prod(eqn.params["grid_mapping"].grid) * sum(inner)
        elif kind.startswith("dot_product_attention"):
            q, k = (variable.aval for variable in eqn.invars[:2])  # b n h k, or b h n k by its `layout`
            total += (10 if "bwd" in kind else 4) * q.size * k.shape[2 if eqn.params["layout"] else 1]
        else:
            total += sum(inner)
    return total


def _inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs: bodies of loops, branches, calls, remat and custom derivatives."""
    for value in eqn.params.values():
        for candidate in value if isinstance(value, tuple | list) else (value,):
            candidate = getattr(candidate, "jaxpr", candidate)
            if hasattr(candidate, "eqns"):
                yield candidate
