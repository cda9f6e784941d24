"""A run on eight devices is the run on one, in every layout: loss, gradients, parameters, samples, and a resume."""

import dataclasses
import functools
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import perturbed_like
from conftest import SMALL, program

from vgjax import sample
from vgjax.models.causal_vae import CausalVAE
from vgjax.models.mmdit import MMDiT
from vgjax.models.text import TextEncoder
from vgjax.nn.codec import LatentStats
from vgjax.objectives.flow import FlowObjective
from vgjax.objectives.vae import VAEObjective
from vgjax.parallel import layouts, sharding
from vgjax.planner import hlo
from vgjax.training import state, step
from vgjax.training.optimizers import adamw, schedule
from vgjax.training.players import alike
from vgjax.typing import Context, Tokens

GOLDEN = Path(__file__).parents[1] / "golden"
BATCH, STEPS, B1 = 8, 3, 0.9
VAE = CausalVAE(width=8, multipliers=(1, 2), blocks=1, time=(2,), space=(2,), latent_channels=4)
# Six heads on eight devices, 2 x 4 x 4 video tokens and 7 of text: the joint sequence divides by nothing.
MODEL = dict(
    dim=48, heads=6, double_blocks=1, single_blocks=1, channels=4, text_dim=16, pooled_dim=16, refiner_blocks=1,
    rope_dims=(2, 2, 4), remat="attention",
)  # fmt: skip


def flow(layout):
    text = TextEncoder(64, 1, dim=16, blocks=1, heads=2, pooled=16)
    return FlowObjective(MMDiT(**MODEL, attention=layout.attention()), text, None, precondition=True)


def vae(layout):
    return VAEObjective(VAE, {"mse": 1.0, "kl": 1e-3})


@dataclasses.dataclass(frozen=True)
class Packed:
    """The squared error of rows that hold two samples of different lengths and padding."""

    model: MMDiT
    players = ("velocity",)

    def prepare(self, frozen, batch):
        return batch

    def init(self, key, batch):
        inputs = [batch[name] for name in ROW]
        return {"velocity": self.model.init(key, *inputs, method="packed")["params"]}

    def loss(self, player, params, batch, key):
        v = self.model.apply({"params": params[player]}, *[batch[name] for name in ROW], method="packed")
        error = jnp.square(v - batch["target"]) * (batch["of_x"] > 0)[:, :, None]
        loss = jnp.mean(error)
        return loss, {"loss": jnp.stack([loss, 1.0])}


ROW = ("x", "places", "of_x", "t", "c", "of_c", "vec")


def packed(layout):
    return Packed(MMDiT(**MODEL, attention=layout.attention()))


def row_of(generator):
    n, m = 37, 11
    cut, end = generator.integers(8, 20, (BATCH, 1)), generator.integers(25, n + 1, (BATCH, 1))
    normal = lambda *shape: generator.standard_normal((BATCH, *shape)).astype(np.float32)  # noqa: E731
    return {
        "x": normal(n, 16),
        "places": generator.integers(0, 6, (BATCH, n, 3)).astype(np.int32),
        "of_x": ((1 + (np.arange(n) >= cut)) * (np.arange(n) < end)).astype(np.int32),
        "t": generator.uniform(0, 1, (BATCH, 2)).astype(np.float32),
        "c": normal(m, 16),
        "of_c": np.tile((1 + (np.arange(m) >= 5)) * (np.arange(m) < 9), (BATCH, 1)).astype(np.int32),
        "vec": normal(2, 16),
        "target": normal(n, 16),
    }


def batch_of(kind, number):
    generator = np.random.default_rng(number)
    index = np.arange(number * BATCH, (number + 1) * BATCH, dtype=np.uint32)
    if kind is packed:
        return {**row_of(generator), "index": index}
    if kind is vae:
        return {"video": generator.integers(0, 256, (BATCH, 3, 8, 32, 3)).astype(np.uint8), "index": index}
    return {
        "latent": generator.standard_normal((BATCH, 2, 8, 8, 4)).astype(np.float32),
        "context": Context(
            {
                "text": Tokens(
                    generator.integers(1, 64, (BATCH, 7, 1)).astype(np.int32),
                    np.arange(7) < generator.integers(2, 8, (BATCH, 1)),
                )
            }
        ),
        "index": index,
    }


def run(kind, name, devices, **asked):
    """(loss and gradients of the first batch, parameters after three steps), the places of these, the compiled step.

    From parameters that no init would give. The gradients are read off Adam's first moment after one step.
    """
    layout, mesh = layouts.find(name, devices, **asked)
    # A key's bias has no gradient, since softmax does not see it: with a small eps Adam makes steps of its rounding.
    objective, optimizer = kind(layout), adamw(schedule("constant", 1e-3, 0, 100), b1=B1, eps=1e-4)
    players = alike(objective.players, optimizer, clip=0.0)
    (player,) = objective.players
    frozen = {"stats": LatentStats(np.zeros(4, np.float32), np.ones(4, np.float32))}
    with sharding.use(layout, mesh):
        example = jax.eval_shape(objective.prepare, frozen, batch_of(kind, 0))
        abstract, _ = state.builder(objective, players, 0, example, layout, mesh)
        params = perturbed_like(abstract.params)
        now = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract).replace(params=params, ema=params)
        now = jax.tree.map(np.array, now)  # each leaf a buffer of its own, to be donated
        now = jax.tree.map(lambda leaf, at: jax.device_put(leaf, at.sharding), now, abstract)
        batches = [sharding.place(batch_of(kind, number), layout, mesh) for number in range(STEPS)]
        train = step.make(objective, players, abstract).lower(abstract, frozen, batches[0]).compile()
        for number, batch in enumerate(batches):
            now, metrics = train(now, frozen, batch)
            if number == 0:
                loss, moment = jax.device_get((metrics["loss"], now.opt[player][0].mu))
    jax.tree.map(
        lambda leaf, at: leaf.sharding.is_equivalent_to(at.sharding, leaf.ndim) or pytest.fail(), now, abstract
    )
    specs = {jax.tree_util.keystr(path): str(leaf.sharding.spec) for path, leaf in leaves(now.params)}
    run = loss[0] / loss[1], jax.tree.map(lambda leaf: leaf / (1 - B1), moment), jax.device_get(now.params)
    return run, specs, train


leaves = jax.tree_util.tree_leaves_with_path


def near(ours, theirs, bound=1e-5):
    """Every leaf within `bound` of its norm."""
    far = {}
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        distance = np.linalg.norm(a - b) / np.linalg.norm(b)
        if not distance <= bound:
            far[jax.tree_util.keystr(path)] = float(distance)
    assert not far


@functools.cache
def one(kind):
    return run(kind, "dp", 1)[0]


CASES = {name: {} for name in layouts.LAYOUTS} | {
    "ulysses of two": {"sequence": 2},
    "usp of four rings": {"sequence": 4, "tensor": 2},
}


# Packed rows differ in what attention sees: they are spread in each way in which it is split. To a VAE, which has no
# attention, hsdp is fsdp, ulysses is ring and tp is dp.
RUNS = [
    *((flow, name) for name in CASES),
    *((packed, name) for name in ("dp", "fsdp_tp", "ulysses", "ring", "usp")),
    *((vae, name) for name in ("dp", "fsdp", "fsdp_tp", "ulysses", "usp")),
]


@pytest.mark.parametrize("kind,name", RUNS, ids=[f"{kind.__name__}-{name}" for kind, name in RUNS])
def test_eight_devices_are_the_same_run_as_one(kind, name):
    loss, gradients, params = one(kind)
    many, specs, train = run(kind, name.split()[0], 8, **CASES[name])
    assert abs(many[0] - loss) <= 1e-5 * abs(loss)
    near(many[1], gradients)
    near(many[2], params)
    sent = Counter()
    for collective in hlo.parse(train.as_text()).collectives():
        sent[collective.kind] += collective.times
    golden(f"{kind.__name__}-{name}", {"collectives": dict(sorted(sent.items())), "params": specs})


def golden(name, seen):
    """What a step sends and where its parameters lie, as written down; VGJAX_GOLDEN=write writes it anew.

    Other versions of the compiler may send otherwise: there only the places are compared.
    """
    path = GOLDEN / f"{name.replace(' ', '_')}.json"
    if os.environ.get("VGJAX_GOLDEN") == "write":
        path.write_text(json.dumps({"jax": jax.__version__, **seen}, indent=1) + "\n")
    written = json.loads(path.read_text())
    assert seen["params"] == written["params"]
    assert seen["collectives"] == written["collectives"] or jax.__version__ != written["jax"]


@pytest.mark.parametrize("name", ["fsdp", "hsdp", "fsdp_tp", "ulysses", "usp"])
def test_no_large_leaf_of_the_state_is_whole_on_every_device(name):
    layout, mesh = layouts.find(name, 8)
    for kind in (flow, vae):
        optimizer = adamw(schedule("constant", 1e-3, 0, 100))
        frozen = {"stats": LatentStats(np.zeros(4, np.float32), np.ones(4, np.float32))}
        objective = kind(layout)
        example = jax.eval_shape(objective.prepare, frozen, batch_of(kind, 0))
        abstract, _ = state.builder(objective, alike(objective.players, optimizer), 0, example, layout, mesh)
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
            if leaf.size >= 1024:
                assert not leaf.sharding.is_fully_replicated, jax.tree_util.keystr(path)


PROMPTS = ["a red circle moves left", "a blue square moves up"]


@pytest.fixture(scope="module")
def alone(trained):
    sampler = sample.load(trained / "dit")
    latents = sampler.sampled(PROMPTS)
    return latents, sampler(PROMPTS)


# One device is one program in all layouts; with two and four, what splits the model, the tokens, or both.
SAMPLED = [(name, 8) for name in layouts.LAYOUTS] + [("fsdp", 1), ("tp", 2), ("ring", 2), ("fsdp_tp", 4), ("usp", 4)]


@pytest.mark.parametrize("name,devices", SAMPLED)
def test_the_same_video_is_sampled_on_any_devices_in_every_layout(trained, alone, name, devices):
    sampler = sample.load(trained / "dit", layout=name, devices=devices)
    np.testing.assert_allclose(sampler.sampled(PROMPTS), alone[0], atol=1e-4)
    if devices == 8:
        assert np.abs(sampler(PROMPTS).astype(int) - alone[1]).max() <= 1


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return np.array([record["loss"] for record in records])


def test_a_run_resumes_on_fewer_devices_in_another_layout(trained, tmp_path):
    for part in ("vae", "data", "latents"):
        shutil.copytree(trained / part, tmp_path / part)
    meta = tmp_path / "latents" / "meta.json"
    meta.write_text(meta.read_text().replace(str(trained), str(tmp_path)))

    def train(kind, devices, lost=()):
        for number in lost:
            shutil.rmtree(tmp_path / "dit" / "checkpoints" / f"{number:08d}")
        flags = [f"--config.layout.kind={kind}", f"--config.layout.devices={devices}", *SMALL]
        where = ["--config", "tests/tiny.py:dit", "--workdir", tmp_path / "dit"]
        ran = program("train", *where, *flags, JAX_NUM_CPU_DEVICES="8")
        assert ran.returncode == 0, ran.stderr
        return losses(tmp_path / "dit")

    one = train("dp", 1)
    shutil.rmtree(tmp_path / "dit")
    whole = train("ulysses", 8)
    np.testing.assert_allclose(whole, one, rtol=1e-5)
    np.testing.assert_allclose(train("usp", 2, lost=(4, 6)), whole, rtol=1e-5)
    np.testing.assert_allclose(train("fsdp_tp", 4, lost=(4, 6)), whole, rtol=1e-5)
