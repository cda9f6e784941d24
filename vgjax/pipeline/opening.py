"""From a path to a Pipeline, by what lies there."""

from pathlib import Path

import jax

from vgjax import experiment
from vgjax.errors import UserError
from vgjax.open import tune
from vgjax.open.families import is_open
from vgjax.open.store import Store
from vgjax.parallel import layouts
from vgjax.pipeline import published, trained
from vgjax.pipeline.pipeline import Pipeline


def load(path: str | Path, weights: str | None = None, layout: str = "", devices: int = 0) -> Pipeline:
    """The pipeline of a training workdir (its checkpoints, one step), of a converted folder, or of a finetuning.

    weights: of a run, `ema` (the default) or `params`. It samples on one device, or on the first `devices` (0: all) by
    the `layout` of this name; see `trained.load` for several processes.
    """
    path = Path(path).absolute()
    if devices < 0 or (devices and not layout):
        raise UserError(
            f"devices={devices} must be 0 or more, and is of no use alone: give --layout, {', '.join(layouts.LAYOUTS)}"
        )
    if is_open(path):
        if weights:
            raise UserError(f"--weights is for runs trained here: {path} holds what was published")
        return of_store(Store(path), layout, devices)
    if found := tune.tuned(path, weights or "ema"):
        folder, tuned = found
        return of_store(Store(folder, tuned=tuned), layout, devices)
    return trained.load(path, weights or "ema", layout, devices)


def of_store(store: Store, layout: str, devices: int) -> Pipeline:
    if jax.process_count() > 1 and not layout:
        raise UserError(f"several processes sample together by a layout: give --layout, {', '.join(layouts.LAYOUTS)}")
    where = layouts.find(layout, devices) if layout else None
    placed = Store(store.folder, experiment.compute_dtype("auto"), where, store.tuned)
    return published.pipeline(placed)
