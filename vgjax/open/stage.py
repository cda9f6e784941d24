"""What every family tells the sampler."""

import dataclasses


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
