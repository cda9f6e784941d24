"""Which fill of the frames before the first learns better: zeros or the first frame replicated?

    python benchmarks/padding.py [steps]

The tiny VAE (32 wide) learns freshly rendered clips of the small world with each, from the same seeds and in the same
order; PSNR over other clips, of all frames and of the first. Writes benchmarks/results/padding.json.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from record import write

from vgjax.data import shapes
from vgjax.metrics.psnr import psnr
from vgjax.models.causal_vae import SIZES, CausalVAE
from vgjax.nn.codec import from_uint8
from vgjax.objectives.vae import VAEObjective
from vgjax.parallel.sharding import unboxed

SEEDS = (0, 1)
BATCH, LR = 4, 1e-3


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    videos = render(64 + 400)
    scores = {
        padding: [learn(padding, seed, steps, videos[64:], videos[:64]) for seed in SEEDS]
        for padding in ("zeros", "replicate")
    }
    rows = [
        dict(padding=padding, psnr=[s[0] for s in each], first_frame_psnr=[s[1] for s in each])
        for padding, each in scores.items()
    ]
    write("padding", {"steps": steps, "batch": BATCH, "lr": LR, "rows": rows})


def render(count: int) -> np.ndarray:
    world, generator = shapes.get("small"), np.random.default_rng(0)
    return np.stack([shapes.render(world.sample(generator)[0], 17, (32, 32)) for _ in range(count)])


def learn(padding: str, seed: int, steps: int, train: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """PSNR in dB (of all frames, of the first) after training."""
    model = CausalVAE(**SIZES["tiny"] | dict(width=32, padding=padding))
    objective = VAEObjective(model, {"mse": 1.0, "kl": 1e-6})
    params = unboxed(objective.init(jax.random.key(seed), {"video": jnp.zeros((1, *train.shape[1:]))}))
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, LR, 20, steps))
    opt = optimizer.init(params)

    @jax.jit
    def step(params, opt, batch, key):
        batch = objective.prepare(None, batch)
        gradients = jax.grad(lambda p: objective.loss("vae", p, batch, key)[0])(params)
        updates, opt = optimizer.update(gradients, opt)
        return optax.apply_updates(params, updates), opt

    generator = np.random.default_rng(seed)
    for i in range(steps):
        index = jnp.arange(BATCH, dtype=jnp.uint32) + i * BATCH
        batch = {"video": jnp.asarray(generator.choice(train, BATCH)), "index": index}
        params, opt = step(params, opt, batch, jax.random.key(seed))
    video = from_uint8(jnp.asarray(held_out))
    recon, _, _ = jax.jit(model.apply)({"params": params["vae"]}, video)
    return round(float(psnr(video, recon).mean()), 2), round(float(psnr(video[:, :1], recon[:, :1]).mean()), 2)


if __name__ == "__main__":
    main()
