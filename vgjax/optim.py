"""Optimizers: AdamW with warm-up, a decay mask and a schedule, fp32 throughout."""

import jax
import optax

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
