"""The VAE objective: a clip's loss depends on the clip, the key and its global index alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.errors import UserError
from vgjax.losses.term import terms
from vgjax.models.causal_vae import CausalVAE
from vgjax.nn.codec import from_uint8
from vgjax.objectives.vae import VAEObjective
from vgjax.parallel.sharding import Named, named, unboxed

MODEL = CausalVAE(width=4, multipliers=(1,), blocks=0, time=(), space=(), patch=4, patch_frames=2, latent_channels=3)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def made():
    objective = VAEObjective(MODEL, {"recon": 1.0, "kl": 0.1})
    video = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8, 3), np.uint8)
    batch = objective.prepare(None, {"video": jnp.asarray(video), "index": jnp.arange(4, dtype=jnp.uint32) + 40})
    params = unboxed(objective.init(jax.random.key(0), batch))
    params["vae"]["encoder"]["conv_out"]["bias"] += 10.0  # log-variance 0: the noise is seen
    return objective, params, batch


@jax.jit
def loss_of(params, batch, key):
    return VAEObjective(MODEL, {"recon": 1.0, "kl": 0.1}).loss("vae", params, batch, key)


def rows(batch, *which):
    return jax.tree.map(lambda leaf: leaf[jnp.asarray(which)], batch)


def test_the_loss_of_a_batch_is_the_mean_of_its_clips_alone(made):
    _, params, batch = made
    alone = [loss_of(params, rows(batch, i), KEY)[0] for i in range(4)]
    np.testing.assert_allclose(loss_of(params, batch, KEY)[0], np.mean(alone), rtol=1e-5)
    assert np.std(alone) > 1e-4


def test_the_noise_of_a_clip_depends_on_the_key_and_its_index_alone(made):
    _, params, batch = made
    same = loss_of(params, rows(batch, 2), KEY)[0]
    turned = [loss_of(params, rows(batch, *order), KEY)[1]["loss"] for order in ([0, 1], [2, 3], [3, 2])]
    np.testing.assert_allclose(turned[1], turned[2], rtol=1e-6)
    np.testing.assert_allclose(turned[1][0] - loss_of(params, rows(batch, 3), KEY)[0], same, rtol=1e-4)
    assert loss_of(params, rows(batch, 2) | {"index": batch["index"][:1]}, KEY)[0] != same
    assert loss_of(params, rows(batch, 2), jax.random.key(8))[0] != same


def test_metrics_are_pairs_that_count_clips(made):
    _, params, batch = made
    loss, metrics = loss_of(params, batch, KEY)
    assert set(metrics) == {"loss", "recon", "kl", "psnr", "latent_std"}
    for value in metrics.values():
        assert value.shape == (2,) and value.dtype == jnp.float32 and value[1] == 4
    np.testing.assert_allclose(metrics["loss"][0] / 4, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"][0], metrics["recon"][0] + 0.1 * metrics["kl"][0], rtol=1e-5)
    assert 0 < metrics["latent_std"][0] / 4 < 2 and 0 < metrics["psnr"][0] / 4 < 40


def test_init_keeps_the_names_and_prepare_maps_bytes_to_minus_one_and_one(made):
    objective, _, batch = made
    params = objective.init(jax.random.key(0), batch)
    assert objective.players == tuple(params) == ("vae",)
    assert all(isinstance(leaf, Named) for leaf in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Named)))
    extremes = jnp.zeros((1, 2, 1, 1, 3), jnp.uint8).at[:, 1].set(255)
    np.testing.assert_array_equal(from_uint8(extremes)[0, :, 0, 0, 0], [-1.0, 1.0])
    assert batch["video"].dtype == jnp.float32 and batch["index"].dtype == jnp.uint32


def test_an_unknown_loss_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match="'lpips'; choose from kl, mse, recon"):
        VAEObjective(MODEL, {"lpips": 1.0})


def test_an_objective_is_hashable_however_its_weights_are_given():
    assert hash(VAEObjective(MODEL, {"recon": 1.0})) == hash(VAEObjective(MODEL, (("recon", 1.0),)))


class Scaled:
    """L2 to a frozen target colour, in units that the term learns."""

    def init(self, key):
        return {"scale": named(jax.nn.initializers.ones, "embed")(key, (3,))}

    def frozen(self):
        return {"target": np.full(3, 0.25, np.float32)}

    def __call__(self, view):
        away = (view.recon - view.frozen["target"]) * view.params["scale"]
        return jnp.square(away).mean((1, 2, 3, 4)), {"away": jnp.abs(away).mean((1, 2, 3, 4))}


def test_a_term_owns_parameters_that_learn_and_frozen_ones_that_do_not(made, monkeypatch):
    monkeypatch.setitem(terms(), "scaled", Scaled())
    _, params, batch = made
    objective = VAEObjective(MODEL, {"recon": 1.0, "kl": 0.1, "scaled": 2.0})
    born = unboxed(objective.init(jax.random.key(0), batch))
    assert objective.players == ("vae", "scaled") and set(born) == set(objective.players)
    everything = born | params | objective.frozen()

    def loss(own):
        return objective.loss("scaled", everything | {"scaled": own}, batch, KEY)

    (total, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(born["scaled"])
    np.testing.assert_allclose(total, loss_of(params, batch, KEY)[0] + 2.0 * metrics["scaled"][0] / 4, rtol=1e-5)
    assert np.all(grads["scale"] > 0) and metrics["scaled/away"][1] == 4
