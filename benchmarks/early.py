"""When is it decided what a sample shows, and where does guidance help?

    python benchmarks/early.py runs/shapes/dit

Held-out clips of the closed world are mixed with noise at a time t and sampled on from there: the smaller t, the more
the model decides by itself. Then samples from noise alone under several guidances. Prompt accuracy, all right, by the
number of objects. Writes benchmarks/results/early.json.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from record import write

from vgjax import evaluate, experiment, program, sample
from vgjax.flow.guidance import cfg
from vgjax.flow.path import sample_keys
from vgjax.flow.steppers import STEPPERS, integrate
from vgjax.metrics import prompt
from vgjax.models.causal_vae import from_unit
from vgjax.objectives.vae import to_uint8

TIMES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6)
GUIDANCES = {
    "none": {"cfg": 1.0},
    "2": {"cfg": 2.0, "interval": (0.0, 1.0)},
    "4": {"cfg": 4.0, "interval": (0.0, 1.0)},
    "4 until t = 0.35": {"cfg": 4.0, "interval": (0.0, 0.35)},
}
CLIPS = 128


def main() -> None:
    program.start()
    sampler = sample.load(sys.argv[1])
    config = sampler.experiment.config
    clips = evaluate.clips_of(experiment.source(config, "val"), config, CLIPS)
    captions = [clip.caption for clip in clips]
    from_clips = {str(t): scores(sampler, captions, continued(sampler, clips, t)) for t in TIMES}
    guided = {name: scores(sampler, captions, sampler(captions, **use)) for name, use in GUIDANCES.items()}
    write("early", {"clips": len(clips), "sampled on from t": from_clips, "guidance": guided})


def continued(sampler: sample.Sampler, clips: list, t: float) -> np.ndarray:
    """Videos sampled from the clips mixed with noise at t."""
    objective, use = sampler.experiment.objective, sampler.settings
    videos = np.stack([clip.array for clip in clips])
    texts = [sampler.experiment.tokenizer(clip.caption) for clip in clips]
    texts += [sampler.experiment.tokenizer("")] * len(clips)
    text, mask = (np.stack(part) for part in zip(*texts, strict=True))
    grid = sampler.experiment.vae.latent_shape(*clips[0].array.shape[:3])
    shift = dataclasses.replace(objective.shift, factor=use.shift)
    times = shift(jnp.linspace(0.0, 1.0, use.steps + 1), objective.model.tokens(grid[:3]))

    @jax.jit
    def run(params, frozen):
        x = objective.prepare(frozen, {"video": videos})["x"]
        keys = sample_keys(jax.random.key(0), np.arange(len(clips), dtype=np.uint32))
        mixed, _ = objective.path.mix(
            jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys), x, jnp.full(len(x), t)
        )
        v = cfg(objective.bind(params, text, mask), use.cfg, use.interval, use.rescale)
        x = integrate(STEPPERS[use.stepper](), v, mixed, t + (1 - t) * times)
        vae = sampler.experiment.vae
        return to_uint8(vae.apply({"params": frozen["vae"]}, from_unit(x, frozen["stats"]), method="decode"))

    return np.asarray(run(sampler.params, sampler.frozen))


def scores(sampler: sample.Sampler, captions: list[str], videos: np.ndarray) -> dict[str, float]:
    """The share of clips that are all right, by the number of objects asked for."""
    world = experiment.world_of(sampler.experiment.config)
    requests = [world.parse(caption) for caption in captions]
    right = np.array([prompt.score(v, asked, world)["all"] for v, asked in zip(videos, requests, strict=True)])
    count = np.array([len(asked.things) for asked in requests])
    return {f"objects {n}": round(float(right[count == n].mean()), 3) for n in np.unique(count)}


if __name__ == "__main__":
    main()
