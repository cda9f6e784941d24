"""When is it decided what a sample shows, and where does guidance help?

    python benchmarks/early.py runs/shapes/dit

Held-out clips of the closed world are mixed with noise at a time t and sampled on from there: the smaller t, the more
the model decides by itself. Then samples from noise alone under several guidances. Prompt accuracy, all right, by the
number of objects. Writes benchmarks/results/early.json.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from record import write

from vgjax import evaluate, experiment, sample
from vgjax.flow.path import sample_keys
from vgjax.flow.schedule import Schedule
from vgjax.metrics import prompt
from vgjax.pipeline.pipeline import Pipeline
from vgjax.training import program

TIMES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)
GUIDANCES = {
    "none": {"cfg": 1.0},
    "2": {"cfg": 2.0, "interval": (0.0, 1.0)},
    "4": {"cfg": 4.0, "interval": (0.0, 1.0)},
    "4 until t = 0.35": {"cfg": 4.0, "interval": (0.0, 0.35)},
    "2.5 until t = 0.6, churn": {"cfg": 2.5, "interval": (0.0, 0.6), "stepper": "churn", "steps": 64},
}
CLIPS = 128


def main() -> None:
    program.start()
    sampler = sample.load(sys.argv[1])
    # Not churn: it goes back to where everything is open.
    sampler = dataclasses.replace(sampler, defaults=functools.partial(sampler.defaults, stepper="euler"))
    config = sampler.source.experiment.config
    clips = evaluate.clips_of(experiment.source(config, "val"), config, CLIPS)
    captions = [clip.caption for clip in clips]
    from_clips = {str(t): scores(sampler, captions, continued(sampler, clips, t)) for t in TIMES}
    guided = {name: scores(sampler, captions, sampler(captions, **use)) for name, use in GUIDANCES.items()}
    write("early", {"clips": len(clips), "sampled on from t": from_clips, "guidance": guided})


def continued(sampler: Pipeline, clips: list, t: float) -> np.ndarray:
    """Videos sampled from the clips mixed with noise at t."""
    objective, use = sampler.source.experiment.objective, sampler.defaults()
    x = sampler.codec.encode(np.stack([clip.array for clip in clips]))
    keys = sample_keys(jax.random.key(0), np.arange(len(clips), dtype=np.uint32))

    @jax.jit
    def mixed(x):
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
        return objective.path.mix(noise, x, jnp.full(len(x), t))[0]

    def later(use, shape):
        (stage,) = sampler.stages(use, shape)
        times = (t + (1 - t) * stage.schedule.times).astype(np.float32)
        return [dataclasses.replace(stage, schedule=Schedule(times, None))]

    rest = dataclasses.replace(sampler, stages=later)
    context = rest.condition([clip.caption for clip in clips], use)
    z = rest.latents(context, use, starts=mixed(x))
    return rest.codec.decode(z, use.batch, use.tile)[0]


def scores(sampler: Pipeline, captions: list[str], videos: np.ndarray) -> dict[str, float]:
    """The share of clips that are all right, by the number of objects asked for."""
    world = experiment.world_of(sampler.source.experiment.config)
    count = [len(world.parse(caption).things) for caption in captions]
    table = {}
    for n in sorted(set(count)):
        those = [i for i, objects in enumerate(count) if objects == n]
        right = prompt.accuracy(videos[those], [captions[i] for i in those], world)
        table[f"objects {n}"] = round(right["all"], 3)
    return table


if __name__ == "__main__":
    main()
