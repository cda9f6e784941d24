"""What every family tells the sampler."""

import dataclasses

from vgjax.errors import UserError, check_finite


@dataclasses.dataclass(frozen=True)
class Stage:
    """A model of the folder, the times that it serves (both ends), and its scale of classifier-free guidance."""

    name: str
    times: tuple[float, ...]
    cfg: float


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to sample. cfg: scale of classifier-free guidance, of each model in turn; guidance: the scale that a
    guidance-distilled model is told. shift: None as published."""

    steps: int
    cfg: tuple[float, ...]
    guidance: float
    frames: int
    size: tuple[int, int]
    fps: float
    shift: float | None = None

    def __post_init__(self) -> None:
        check_finite(cfg=self.cfg, guidance=self.guidance, shift=self.shift, fps=self.fps)
        if self.steps < 1 or self.frames < 1 or min(self.size) < 1:
            raise UserError(f"steps={self.steps}, frames={self.frames} and size={self.size} must be at least 1")
        if self.fps <= 0 or (self.shift is not None and self.shift <= 0):
            raise UserError(f"fps={self.fps} and shift={self.shift} must be positive")
