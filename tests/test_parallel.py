"""A run on eight devices is the run on one, in every layout: loss, gradients, three steps, and what is sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import perturbed_like

from vgjax import layouts, sharding, state, step
from vgjax.models.causal_vae import CausalVAE, LatentStats
from vgjax.models.mmdit import MMDiT
from vgjax.models.text import TextEncoder
from vgjax.objectives.flow import FlowObjective
from vgjax.objectives.vae import VAEObjective
from vgjax.optim import adamw, schedule

BATCH, STEPS = 8, 3
VAE = CausalVAE(width=8, multipliers=(1, 2), blocks=1, time=(2,), space=(2,), latent_channels=4)
# Six heads on eight devices, 4 x 4 x 4 video tokens and 7 of text: nothing in the joint sequence divides by eight.
MODEL = dict(
    dim=48, heads=6, double_blocks=1, single_blocks=2, channels=4, text_dim=16, pooled_dim=16, refiner_blocks=1,
    rope_dims=(2, 2, 4), remat="full",
)  # fmt: skip


def flow(layout):
    text = TextEncoder(64, 1, dim=16, blocks=1, heads=2, pooled=16)
    return FlowObjective(MMDiT(**MODEL, attention=layout.attention()), text, None, precondition=True)


def vae(layout):
    return VAEObjective(VAE, {"mse": 1.0, "kl": 1e-3})


def batch_of(kind, number):
    generator = np.random.default_rng(number)
    index = np.arange(number * BATCH, (number + 1) * BATCH, dtype=np.uint32)
    if kind is vae:
        return {"video": generator.integers(0, 256, (BATCH, 3, 16, 32, 3)).astype(np.uint8), "index": index}
    return {
        "latent": generator.standard_normal((BATCH, 4, 8, 8, 4)).astype(np.float32),
        "text": generator.integers(1, 64, (BATCH, 7, 1)).astype(np.int32),
        "mask": np.arange(7) < generator.integers(2, 8, (BATCH, 1)),
        "index": index,
    }


def run(kind, name, devices, **asked):
    """Loss and gradients of the first batch, parameters after three steps, and the step's compiled text."""
    layout, mesh = layouts.find(name, devices, **asked)
    objective = kind(layout)
    optimizer = adamw(schedule("constant", 1e-3, 0, 100))
    frozen = {"stats": LatentStats(np.zeros(4, np.float32), np.ones(4, np.float32))}
    (player,) = objective.players
    with sharding.use(layout, mesh):
        example = jax.eval_shape(objective.prepare, frozen, batch_of(kind, 0))
        abstract, init = state.builder(objective, optimizer, 0, example, layout, mesh)
        now = init()
        params = jax.tree.map(
            lambda leaf, at: jax.device_put(leaf, at.sharding), perturbed_like(abstract.params), abstract.params
        )
        now = now.replace(params=params, ema=jax.tree.map(jnp.copy, params))

        @jax.jit
        def gradients(params, batch):
            def loss(own):
                return objective.loss(player, {player: own}, objective.prepare(frozen, batch), jax.random.key(3))[0]

            return jax.value_and_grad(loss)(params[player])

        first = jax.device_get(gradients(params, sharding.place(batch_of(kind, 0), layout, mesh)))
        train = step.make(objective, optimizer, abstract)
        for number in range(STEPS):
            now, _ = train(now, frozen, sharding.place(batch_of(kind, number), layout, mesh))
    jax.tree.map(lambda leaf, a: leaf.sharding.is_equivalent_to(a.sharding, leaf.ndim) or pytest.fail(), now, abstract)
    return *first, jax.device_get(now.params), abstract


def near(ours, theirs, bound=1e-5):
    """Every leaf within `bound` of its norm."""
    far = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        distance = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not distance <= bound:
            far[jax.tree_util.keystr(path)] = float(distance)
    assert not far


@pytest.fixture(scope="module")
def one():
    return {kind: run(kind, "dp", 1) for kind in (flow, vae)}


LAYOUTS = [(name, {}) for name in layouts.LAYOUTS] + [
    ("ulysses", {"sequence": 2}),
    ("usp", {"sequence": 4, "tensor": 2}),
]


@pytest.mark.parametrize("kind", [flow, vae], ids=["mmdit", "vae"])
@pytest.mark.parametrize(
    "name,asked", LAYOUTS, ids=[name + "".join(f"-{k}{v}" for k, v in a.items()) for name, a in LAYOUTS]
)
def test_eight_devices_are_the_same_run_as_one(one, kind, name, asked):
    loss, gradients, params, _ = one[kind]
    many = run(kind, name, 8, **asked)
    assert abs(many[0] - loss) <= 1e-5 * abs(loss)
    near(many[1], gradients)
    near(many[2], params)
