"""Optimizers: AdamW or Muon with warm-up, a decay mask and a schedule, fp32 throughout."""

import jax
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from vgjax.errors import UserError
from vgjax.typing import Params, PyTree

SCHEDULES = ("constant", "cosine", "linear")


def schedule(kind: str, lr: float, warmup: int, steps: int, final: float = 0.0) -> optax.Schedule:
    """Linear warm-up to `lr`, then constant, or cosine or linear decay to `final * lr` at `steps`."""
    if kind not in SCHEDULES:
        raise UserError(f"config.optim.schedule={kind!r} is unknown: use one of {', '.join(SCHEDULES)}")
    if not 0 <= warmup < steps:
        raise UserError(f"config.optim.warmup={warmup} must lie in [0, config.train.steps={steps})")
    rest = steps - warmup
    after = {
        "constant": optax.constant_schedule(lr),
        "cosine": optax.cosine_decay_schedule(lr, rest, final),
        "linear": optax.linear_schedule(lr, final * lr, rest),
    }[kind]
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), after], [warmup]) if warmup else after


def decay_mask(params: Params) -> PyTree:
    """True for kernels alone: biases, norm scales and embeddings are not decayed, stacked in layers or not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") == "kernel", params)


def adamw(
    rate: optax.Schedule, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019). Clipping is the step's, which needs the norm to judge the step."""
    return optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask)


def muon(
    rate: optax.Schedule,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.95,
    adam: float = 0.4,
    iterations: int = 5,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices inside blocks, AdamW at `adam` times the rate for everything else.

    Updates are scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable", section 2.2), so that rates carry
    over.
    """
    return optax_muon(
        rate,
        ns_steps=iterations,
        beta=momentum,
        eps=eps,
        weight_decay=weight_decay,
        weight_decay_mask=decay_mask,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=weight_decay,
        adam_learning_rate=lambda count: adam * rate(count),
        consistent_rms=0.2,
        muon_weight_dimension_numbers=hidden_matrices,
    )


# Layers inside blocks whose kernel is a matrix: (dims that are summed over, dims that come out), the kernel's last.
MATRICES = {"qkv": (1, 2), "merge": (2, 1), "up": (1, 1), "down": (1, 1), "conv_1": (4, 1), "conv_2": (4, 1)}


def hidden_matrices(params: Params) -> PyTree:
    """The dims of each matrix that Muon makes orthogonal, None for what AdamW trains; stacks count as many."""

    def one(path: tuple, leaf: jax.Array) -> MuonDimensionNumbers | None:
        names = [str(getattr(entry, "key", "")) for entry in path]
        inside = any(name.startswith("block") for name in names)
        if names[-1] != "kernel" or not inside or names[-2] not in MATRICES:
            return None
        reduced, out = MATRICES[names[-2]]
        n = leaf.ndim
        return MuonDimensionNumbers(tuple(range(n - out - reduced, n - out)), tuple(range(n - out, n)))

    return jax.tree_util.tree_map_with_path(one, params)


OPTIMIZERS = {"adamw": adamw, "muon": muon}
