"""Who is trained: each player has an optimizer, a cadence and an average of its own."""

import dataclasses
from collections.abc import Sequence

import optax

from vgjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Player:
    """A part of the parameters that learns by itself.

    clip: bound of its global gradient norm (0: none). ema: decay of its average, which warms up as `(1 + n) / (10 + n)`
    over its own updates `n`. It learns at every `every`-th step from step `starts` (counted from 0) on; its optimizer's
    schedule counts its own updates.
    """

    name: str
    optimizer: optax.GradientTransformation | None  # None while a config is read
    clip: float = 1.0
    ema: float = 0.999
    every: int = 1
    starts: int = 0

    def __post_init__(self) -> None:
        if self.clip < 0 or not 0 <= self.ema < 1 or self.every < 1 or self.starts < 0:
            raise UserError(
                f"the player {self.name} needs clip >= 0, 0 <= ema < 1, every >= 1 and starts >= 0, got "
                f"clip={self.clip}, ema={self.ema}, every={self.every}, starts={self.starts}"
            )

    @property
    def always(self) -> bool:
        """Whether it learns at every step."""
        return self.every == 1 and self.starts == 0

    def updates(self, steps: int) -> int:
        """How often it learns in so many steps."""
        return max(0, -(-(steps - self.starts) // self.every))


def alike(names: Sequence[str], optimizer: optax.GradientTransformation, **how: float) -> tuple[Player, ...]:
    """Players of these names that differ in nothing else; `how`: fields of `Player`."""
    return tuple(Player(name, optimizer, **how) for name in names)
