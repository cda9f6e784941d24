"""What every family tells the sampler."""

import dataclasses

from vgjax.flow import guidance, steppers
from vgjax.flow.schedule import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A model of the folder, the times that it serves (both ends), and its scale of classifier-free guidance."""

    name: str
    schedule: Schedule
    cfg: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample. cfg: scale of classifier-free guidance, of each model in turn, at times within `interval`;
    guidance: the scale that a guidance-distilled model is told. shift: None as published."""

    steps: int
    cfg: tuple[float, ...]
    guidance: float
    frames: int
    size: tuple[int, int]
    fps: float
    stepper: str
    shift: float | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0

    def __post_init__(self) -> None:
        steppers.named(self.stepper)
        guidance.check(self.interval, self.rescale)
