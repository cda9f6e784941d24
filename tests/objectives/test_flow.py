"""The rectified-flow objective: each sample's loss is its own, whatever batch it comes in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.flow.path import Straight, sample_keys
from vgjax.flow.time import LogitNormal, Shift
from vgjax.models.causal_vae import CausalVAE
from vgjax.models.mmdit import MMDiT
from vgjax.models.text import TextEncoder
from vgjax.nn.codec import LatentStats
from vgjax.objectives.flow import FlowObjective
from vgjax.parallel import sharding
from vgjax.typing import Context, Tokens

VAE = CausalVAE(width=4, multipliers=(1, 2), blocks=1, time=(2,), space=(2,), patch=2, latent_channels=4)
MODEL = MMDiT(
    dim=16, heads=2, double_blocks=1, single_blocks=1, refiner_blocks=1, rope_dims=(2, 2, 4), channels=4, text_dim=8,
    pooled_dim=8,
)  # fmt: skip
TEXT = TextEncoder(vocab=32, hashes=2, dim=8, blocks=1, heads=2, pooled=8)
OBJECTIVE = FlowObjective(MODEL, TEXT, VAE, time=LogitNormal(), shift=Shift(2.0))
KEY = jax.random.key(11)


def batch_of(rows) -> dict:
    rng = np.random.default_rng(0)
    whole = {
        "latent": rng.normal(size=(8, 2, 4, 4, 4)).astype(np.float32) * 3 + 1,
        "context": Context(
            {"text": Tokens(rng.integers(1, 32, (8, 5, 2), dtype=np.int32), np.arange(5) < rng.integers(1, 6, (8, 1)))}
        ),
        "index": np.arange(100, 108, dtype=np.uint32),
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[np.asarray(rows)]), whole)


@pytest.fixture(scope="module")
def frozen():
    params = jax.jit(lambda k: sharding.unboxed(VAE.init(k, jnp.zeros((1, 3, 16, 16, 3)))["params"]))(jax.random.key(1))
    return {"vae": params, "stats": LatentStats(jnp.ones(4), 3 * jnp.ones(4))}


@pytest.fixture(scope="module")
def params(frozen):
    example = OBJECTIVE.prepare(frozen, batch_of([0, 1]))
    params = jax.jit(lambda key: sharding.unboxed(OBJECTIVE.init(key, example)))(jax.random.key(2))
    rng = np.random.default_rng(3)  # away from the zeros of the output layer
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)


@jax.jit
def loss(params, batch):
    return OBJECTIVE.loss("velocity", params, batch, KEY)


def test_the_loss_is_the_mean_of_its_samples_also_at_batch_one_and_in_any_order(params, frozen):
    whole, metrics = loss(params, OBJECTIVE.prepare(frozen, batch_of(range(8))))
    single = [float(loss(params, OBJECTIVE.prepare(frozen, batch_of([i])))[0]) for i in range(8)]
    np.testing.assert_allclose(whole, np.mean(single), rtol=1e-5)
    assert len({round(value, 4) for value in single}) == 8
    mixed, _ = loss(params, OBJECTIVE.prepare(frozen, batch_of([5, 2, 7, 0, 1, 3, 6, 4])))
    np.testing.assert_allclose(whole, mixed, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], [np.sum(single), 8], rtol=1e-5)


def test_bins_share_out_the_samples_by_their_shifted_time(params, frozen):
    _, metrics = loss(params, OBJECTIVE.prepare(frozen, batch_of(range(8))))
    bins = np.stack([metrics[f"loss/t{i}"] for i in range(4)])
    np.testing.assert_allclose(bins.sum(0), metrics["loss"], rtol=1e-5)
    keys = jax.vmap(lambda k: jax.random.split(k))(sample_keys(KEY, jnp.arange(100, 108, dtype=jnp.uint32)))
    t = np.asarray(Shift(2.0)(LogitNormal().sample(keys[:, 0]), 8))
    np.testing.assert_array_equal(bins[:, 1], np.histogram(t, [0, 0.25, 0.5, 0.75, 1])[0])


def test_a_model_that_is_zero_has_the_error_of_data_minus_noise(params, frozen):
    batch = OBJECTIVE.prepare(frozen, batch_of(range(4)))
    zero = jax.tree.map(jnp.zeros_like, params)
    keys = sample_keys(KEY, batch["index"])
    errors = jax.jit(OBJECTIVE.errors)(zero, batch, jnp.full((4,), 0.3), keys)
    noise = jax.vmap(lambda k: jax.random.normal(k, batch["x"].shape[1:]))(keys)
    _, velocity = Straight().mix(noise, batch["x"], jnp.full((4,), 0.3))
    np.testing.assert_allclose(errors, jnp.square(velocity).mean((1, 2, 3, 4)), rtol=1e-5)


def test_latents_are_scaled_and_videos_encoded_to_the_same(frozen):
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    video = jnp.asarray(video)
    rest = batch_of([0, 1])
    encode = jax.jit(lambda params, video: VAE.apply({"params": params}, video, method="encode"))
    mean, _ = encode(frozen["vae"], jnp.asarray(video / 127.5 - 1, jnp.float32))
    latent = {**rest, "latent": mean}
    del rest["latent"]
    from_video, from_latent = (jax.jit(OBJECTIVE.prepare)(frozen, b) for b in ({**rest, "video": video}, latent))
    np.testing.assert_allclose(from_video["x"], from_latent["x"], atol=1e-5)
    np.testing.assert_allclose(from_video["x"], (mean - 1) / 3, atol=1e-5)
    assert "video" not in from_video and "latent" not in from_latent


def test_gradients_reach_every_parameter_and_one_nan_sample_makes_the_loss_nan(params, frozen):
    batch = OBJECTIVE.prepare(frozen, batch_of(range(4)))
    grads = jax.jit(jax.grad(lambda p: OBJECTIVE.loss("velocity", p, batch, KEY)[0]))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    bad = {**batch, "x": batch["x"].at[2, 0, 0, 0, 0].set(jnp.nan)}
    assert np.isnan(loss(params, bad)[0])
