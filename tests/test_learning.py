"""A small model leaves the plateau where only colour is right: where a caption says things go must change the video.

Latents are pooled pixels, so that the test guards the MM-DiT, its text path and the objective, and takes seconds. The
full check, with the VAE, is `benchmarks/learning.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce

from vgjax.data import captions, shapes, text
from vgjax.data.captions import Request
from vgjax.flow.path import sample_keys
from vgjax.flow.time import Shift
from vgjax.models.mmdit import MMDiT
from vgjax.models.text import TextEncoder
from vgjax.nn.codec import LatentStats
from vgjax.objectives.flow import FlowObjective
from vgjax.parallel import layouts
from vgjax.training import optimizers, state, step
from vgjax.training.players import alike

WORLD = shapes.World(("red", "blue"), ("circle",), ("left", "right", "up", "down"), ("black",), frames=5)
OTHER = {"left": "right", "right": "left", "up": "down", "down": "up"}
BATCH, STEPS, HELD_OUT = 16, 250, 64
TOKENIZER = text.Words(8, buckets=256)


def rendered(count):
    """(latents `n 5 8 8 3`, requests): clips without the held-out captions, freshly drawn."""
    generator = np.random.default_rng(0)
    scenes = [WORLD.sample(generator)[0] for _ in range(count)]
    videos = np.stack([shapes.render(scene, 5, (32, 32)) for scene in scenes]).astype(np.float32)
    return reduce(videos, "n t (h i) (w j) c -> n t h w c", "mean", i=4, j=4), [scene.request for scene in scenes]


def read(requests):
    return text.Learned(TOKENIZER)([captions.plain(request) for request in requests])


def changed(requests, **words):
    """The requests with other words for a field: `motion={"left": "right"}`."""
    ((field, other),) = words.items()
    return [
        Request(
            tuple(thing._replace(**{field: other[getattr(thing, field)]}) for thing in request.things),
            request.background,
        )
        for request in requests
    ]


def test_the_loss_comes_to_depend_on_colour_and_on_motion():
    latents, requests = rendered(600 + HELD_OUT)
    stats = LatentStats(latents.mean((0, 1, 2, 3)), latents.std((0, 1, 2, 3)))
    model = MMDiT(
        dim=64, heads=4, double_blocks=1, single_blocks=2, channels=3, text_dim=32, pooled_dim=32, refiner_blocks=0,
        rope_dims=(4, 6, 6), absolute=True, scan=False,
    )  # fmt: skip
    encoder = TextEncoder(TOKENIZER.vocab, TOKENIZER.hashes, dim=32, blocks=1, heads=2, pooled=32, scan=False)
    objective = FlowObjective(model, encoder, None, shift=Shift(3.0), precondition=True)
    data = {"latent": latents, "context": read(requests)}

    def batch(rows, first):
        some = jax.tree.map(lambda leaf: leaf[rows], data)
        return some | {"index": first + np.arange(len(rows), dtype=np.uint32)}

    layout, mesh = layouts.find("dp", 1)
    frozen = {"stats": stats}
    players = alike(
        objective.players, optimizers.muon(optimizers.schedule("cosine", 4e-3, 20, STEPS), iterations=3), ema=0.9
    )
    example = jax.eval_shape(objective.prepare, frozen, batch(np.arange(BATCH), 0))
    abstract, init = state.builder(objective, players, 0, example, layout, mesh)
    # The suite's compiler flags are for programs that are run once: this one is run often.
    made = step.make(objective, players, abstract).lower(abstract, frozen, batch(np.arange(BATCH), 0))
    train = made.compile(compiler_options={"xla_backend_optimization_level": 1})
    now, generator = init(), np.random.default_rng(0)
    for i in range(STEPS):
        rows = HELD_OUT + generator.integers(600, size=BATCH)
        now, _ = train(now, frozen, batch(rows, i * BATCH))

    @jax.jit
    def loss(params, batch, t):
        batch = objective.prepare(frozen, batch)
        keys = sample_keys(jax.random.key(1), batch["index"])
        return jnp.mean(objective.errors(params, batch, jnp.full(HELD_OUT, t), keys))

    held_out = batch(np.arange(HELD_OUT), 0)
    asked = {
        "right": requests[:HELD_OUT],
        "color": changed(requests[:HELD_OUT], color={"red": "blue", "blue": "red"}),
        "motion": changed(requests[:HELD_OUT], motion=OTHER),
    }
    losses = {
        name: np.mean([loss(now.ema, held_out | {"context": read(those)}, t) for t in (0.05, 0.2, 0.4)])
        for name, those in asked.items()
    }
    print(losses)
    assert losses["color"] > 1.3 * losses["right"]
    assert losses["motion"] > 1.15 * losses["right"]
