"""Does the model know which of two objects does what?

    python benchmarks/binding.py runs/shapes/dit

Held-out clips with two objects and the plain caption of what they show, then the same caption with the two shapes,
motions or colours exchanged: by how much the velocity loss rises at a time t, with the same noise. A model that reads
the words but not what belongs together pays nothing. Writes benchmarks/results/binding.json.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from record import write

from vgjax import evaluate, experiment, sample
from vgjax.data import captions
from vgjax.data.captions import Request
from vgjax.flow.path import sample_keys
from vgjax.training import program

TIMES = (0.1, 0.2, 0.3, 0.45)
ATTRIBUTES = ("color", "shape", "motion")
CLIPS, NOISES = 128, 6  # of each split; noises a clip


def main() -> None:
    program.start()
    pipeline = sample.load(sys.argv[1])
    run = pipeline.source
    config, objective = run.experiment.config, run.experiment.objective
    world = experiment.world_of(config)
    clips = [clip for split in ("val", "novel") for clip in two_objects(config, split)]
    requests = [world.parse(clip.caption) for clip in clips]
    index = np.arange(len(clips), dtype=np.uint32)
    x = pipeline.codec.encode(np.stack([clip.array for clip in clips]))

    @jax.jit
    def errors(params, context, t, key):
        batch = {"x": x, "context": context, "index": index}
        return objective.errors(params, batch, jnp.full(len(clips), t), sample_keys(key, index))

    def loss(some: list[Request], t: float) -> np.ndarray:
        context = run.experiment.conditioner([captions.plain(request) for request in some])
        return np.mean([errors(run.params, context, t, jax.random.key(i)) for i in range(NOISES)], axis=0)

    rows = []
    for t in TIMES:
        row, base = {"t": t}, loss(requests, t)
        for name in ATTRIBUTES:
            differ = np.array([len({getattr(thing, name) for thing in request.things}) > 1 for request in requests])
            row[name] = float((loss([exchanged(request, name) for request in requests], t) - base)[differ].mean())
        rows.append({**row, "loss": float(base.mean())})
    write("binding", {"clips": len(clips), "rise of the loss": rows})


def two_objects(config, split: str) -> list:
    clips = evaluate.clips_of(experiment.source(config, split), config, CLIPS)
    return [clip for clip in clips if len(experiment.world_of(config).parse(clip.caption).things) == 2]


def exchanged(request: Request, name: str) -> Request:
    """The same with one attribute of the two things exchanged."""
    first, second = request.things
    swapped = (first._replace(**{name: getattr(second, name)}), second._replace(**{name: getattr(first, name)}))
    return dataclasses.replace(request, things=swapped)


if __name__ == "__main__":
    main()
