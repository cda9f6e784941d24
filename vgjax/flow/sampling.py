"""How to sample: one set of options for every model."""

import dataclasses

from vgjax.errors import UserError, check_finite
from vgjax.flow import guidance, steppers


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of sampling; each pipeline has its own defaults.

    cfg: scale of classifier-free guidance, one for each model that takes its turn, acting at times within `interval`;
    guidance: the scale that a guidance-distilled model is told. shift: of the times towards noise, None as published.
    frames, size (height, width) and fps are of the video. batch: videos at a time; they are decoded in tiles of `tile`
    latent positions a side (0: whole), which overlap, where memory is short.
    """

    steps: int = 30
    cfg: float | int | tuple[float | int, ...] = 3.0
    shift: float | int | None = None
    stepper: str = "euler"
    interval: tuple[float | int, float | int] = (0.0, 1.0)
    rescale: float | int = 0.0
    guidance: float | int = 1.0
    batch: int = 32
    tile: int = 0
    frames: int = 1
    size: tuple[int, int] = (1, 1)
    fps: float | int = 24.0

    def __post_init__(self) -> None:
        numbers = ("cfg", "shift", "interval", "rescale", "guidance", "fps")
        check_finite(**{name: getattr(self, name) for name in numbers})
        object.__setattr__(self, "cfg", self.cfg if isinstance(self.cfg, tuple) else (self.cfg,))
        steppers.named(self.stepper)
        guidance.check(self.interval, self.rescale)
        if self.steps < 1 or self.batch < 1 or self.tile < 0:
            raise UserError(
                f"steps={self.steps} and batch={self.batch} must be at least 1, tile={self.tile} at least 0"
            )
        if self.frames < 1 or min(self.size) < 1:
            raise UserError(f"frames={self.frames} and size={self.size} must be at least 1")
        if self.fps <= 0 or (self.shift is not None and self.shift <= 0):
            raise UserError(f"fps={self.fps} and shift={self.shift} must be positive")

    @property
    def guided(self) -> bool:
        """Whether any model is guided away from something."""
        return any(scale != 1.0 for scale in self.cfg)
