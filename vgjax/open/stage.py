"""What every family tells the pipeline of a model that takes its turn."""

import dataclasses

from vgjax.flow.schedule import Schedule


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """A model of the folder, the times that it serves (both ends), and its scale of classifier-free guidance."""

    name: str
    schedule: Schedule
    cfg: float
