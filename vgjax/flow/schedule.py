"""The times at which published samplers evaluate their models, from their scheduler_config.json.

They count noise levels sigma from 1 to 0; t = 1 - sigma.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from vgjax.errors import UserError


def euler(config: Mapping[str, Any], steps: int, whole: bool) -> Float32[np.ndarray, " k"]:
    """`steps` + 1 times of FlowMatchEulerDiscreteScheduler.

    whole: the levels run evenly from 1 to 0 before the shift, as a pipeline may ask for; else, as the scheduler does by
    itself, from 1 to the shifted level of the last of its training steps, and are shifted again.
    """
    _refuse(
        config,
        "use_dynamic_shifting",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "shift_terminal",
    )
    shift, trained = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
    if whole:
        levels = np.linspace(1.0, 0.0, steps + 1)[:-1].astype(np.float32)
    else:
        levels = np.linspace(1.0, _shifted(1.0 / trained, shift), steps)
    return _times(_shifted(levels, shift))


def unipc(config: Mapping[str, Any], steps: int) -> Float32[np.ndarray, " k"]:
    """`steps` + 1 times of UniPCMultistepScheduler for flows."""
    _refuse(config, "use_dynamic_shifting", "shift_terminal")
    if not config.get("use_flow_sigmas") or config.get("final_sigmas_type", "zero") != "zero":
        raise UserError("scheduler: UniPCMultistepScheduler is supported for flows (use_flow_sigmas) that end at zero")
    levels = np.linspace(1.0, 1.0 / config.get("num_train_timesteps", 1000), steps + 1)[:-1]
    return _times(_shifted(levels, config.get("flow_shift", 1.0)))


def _shifted(levels: Any, shift: float) -> Any:
    return shift * levels / (1.0 + (shift - 1.0) * levels)


def _times(levels: np.ndarray) -> Float32[np.ndarray, " k"]:
    return (1.0 - np.append(levels, 0.0)).astype(np.float32)


def _refuse(config: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if config.get(key):
            raise UserError(f"scheduler: {key}={config[key]!r} is not supported")
