"""How published samplers integrate, and at which times they evaluate their models, from their scheduler_config.json.

They count noise levels sigma from 1 to 0; t = 1 - sigma.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32

from vgjax.errors import UserError
from vgjax.typing import Config

# The stepper of each scheduler, and the name that it has for its shift.
SCHEDULERS = {"FlowMatchEulerDiscreteScheduler": ("euler", "shift"), "UniPCMultistepScheduler": ("unipc", "flow_shift")}


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The times between which a sampler steps, and those that its network is told there, None where they are these."""

    times: Float32[np.ndarray, " k"]
    told: Float32[np.ndarray, " k"] | None


def stepper(config: Config) -> str:
    """The name in `STEPPERS` of the scheduler's method; a `UserError` for one that is not written."""
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise UserError(f"scheduler: {name} is not supported; known are {', '.join(SCHEDULERS)}")
    return SCHEDULERS[name][0]


def published(config: Config, steps: int, shift: float | None = None, whole: bool = False) -> Schedule:
    """`steps` + 1 times of the scheduler that the config names. shift: None as published; whole: see `euler`."""
    method = stepper(config)
    if shift is not None:
        config = {**config, SCHEDULERS[config["_class_name"]][1]: shift}
    return unipc(config, steps) if method == "unipc" else euler(config, steps, whole)


def euler(config: Config, steps: int, whole: bool) -> Schedule:
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
        "invert_sigmas",
        "stochastic_sampling",
    )
    shift, trained = config.get("shift", 1.0), config.get("num_train_timesteps", 1000)
    if whole:
        levels = np.linspace(1.0, 0.0, steps + 1)[:-1].astype(np.float32)
    else:
        levels = np.linspace(1.0, _shifted(1.0 / trained, shift), steps)
    times = (1.0 - np.append(_shifted(levels, shift), 0.0)).astype(np.float32)
    return Schedule(times, times)


def unipc(config: Config, steps: int) -> Schedule:
    """`steps` + 1 times of UniPCMultistepScheduler for flows; the network is told whole training steps, cut off."""
    _refuse(
        config,
        "use_dynamic_shifting",
        "shift_terminal",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "thresholding",
        "disable_corrector",
        "solver_p",
    )
    if not config.get("use_flow_sigmas") or config.get("final_sigmas_type", "zero") != "zero":
        raise UserError("scheduler: UniPCMultistepScheduler is supported for flows (use_flow_sigmas) that end at zero")
    written = {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True}
    for key, value in {**written, "prediction_type": "flow_prediction"}.items():
        if config.get(key, value) != value:
            raise UserError(f"scheduler: {key}={config[key]!r} is not supported, only {value!r} is")
    trained = config.get("num_train_timesteps", 1000)
    levels = _shifted(np.linspace(1.0, 1.0 / trained, steps + 1)[:-1], config.get("flow_shift", 1.0))
    levels[0] = min(levels[0], 1.0 - 1e-6)  # pure noise has no logarithm of its signal
    told = 1.0 - np.append(np.trunc(levels * trained) / trained, 0.0)
    return Schedule(np.float32(1.0) - np.append(levels, 0.0).astype(np.float32), told.astype(np.float32))


def _shifted(levels: np.ndarray | float, shift: float) -> np.ndarray | float:
    return shift * levels / (1.0 + (shift - 1.0) * levels)


def _refuse(config: Config, *keys: str) -> None:
    for key in keys:
        if config.get(key):
            raise UserError(f"scheduler: {key}={config[key]!r} is not supported")
