"""What every family tells the sampler."""

import dataclasses

from vgjax.errors import UserError, check_finite
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
        check_finite(
            cfg=self.cfg,
            guidance=self.guidance,
            shift=self.shift,
            fps=self.fps,
            interval=self.interval,
            rescale=self.rescale,
        )
        steppers.named(self.stepper)
        guidance.check(self.interval, self.rescale)
        if self.steps < 1 or self.frames < 1 or min(self.size) < 1:
            raise UserError(f"steps={self.steps}, frames={self.frames} and size={self.size} must be at least 1")
        if self.fps <= 0 or (self.shift is not None and self.shift <= 0):
            raise UserError(f"fps={self.fps} and shift={self.shift} must be positive")
