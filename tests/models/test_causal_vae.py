"""The causal VAE: exact causality, images, streams, tiles, sizes, gradients, and where it starts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import battery
from vgjax.errors import UserError
from vgjax.metrics.psnr import psnr
from vgjax.models import causal_vae
from vgjax.models.causal_vae import SIZES, CausalVAE
from vgjax.nn import codec
from vgjax.parallel.sharding import unboxed

SMALL = dict(width=8, multipliers=(1, 2), blocks=1, latent_channels=4)
MODELS = {
    "strided": CausalVAE(**SMALL | dict(multipliers=(1, 1, 2)), time=(2, 2), space=(2, 1), patch=2),
    "folded": CausalVAE(**SMALL, time=(2,), space=(1,), patch_frames=2, patch=4, padding="replicate"),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module", params=MODELS)
def trained(request):
    """A model, parameters away from their zeros, a video and its encoding."""
    model, video = MODELS[request.param], normal(0, 1, 13, 16, 8, 3)
    params = battery.perturbed(model, video)
    return model, params, video, encode(model, params, video)


def encode(model, params, video):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(params, video)


def decode(model, params, z):
    return jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, z)


@pytest.mark.parametrize("t", [0, 1, 2])
def test_latent_t_ignores_future_frames(trained, t):
    model, params, video, (mean, logvar) = trained
    last = 4 * t  # of the frames that latent t may see
    other = video.at[:, last + 1 :].set(normal(5, 1, 12 - last, 16, 8, 3))
    changed, changed_logvar = encode(model, params, other)
    np.testing.assert_array_equal(changed[:, : t + 1], mean[:, : t + 1])
    np.testing.assert_array_equal(changed_logvar[:, : t + 1], logvar[:, : t + 1])
    assert jnp.all(jnp.any(changed[:, t + 1 :] != mean[:, t + 1 :], axis=(0, 2, 3, 4)))


@pytest.mark.parametrize("t", [0, 1, 2])
def test_frames_of_latent_t_ignore_future_latents(trained, t):
    model, params, _, (mean, _) = trained
    changed = decode(model, params, mean.at[:, t + 1 :].add(1.0))
    video = decode(model, params, mean)
    np.testing.assert_array_equal(changed[:, : 4 * t + 1], video[:, : 4 * t + 1])
    assert jnp.all(jnp.any(changed[:, 4 * t + 1 :] != video[:, 4 * t + 1 :], axis=(0, 2, 3, 4)))


def test_an_image_is_the_first_frame_of_a_video(trained):
    model, params, video, (mean, _) = trained
    first, _ = encode(model, params, video[:, :1])
    assert first.shape[1] == 1
    np.testing.assert_allclose(first, mean[:, :1], rtol=1e-4, atol=1e-5)
    assert decode(model, params, first).shape == (1, 1, 16, 8, 3)


@pytest.mark.parametrize("chunk", [4, 8, 12])
def test_streaming_encode_equals_whole(trained, chunk):
    model, params, video, whole = trained
    for part, all_ in zip(codec.encode_stream(model, params, video, chunk), whole, strict=True):
        scale = jnp.max(jnp.abs(all_))
        np.testing.assert_allclose(part / scale, all_ / scale, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_streaming_decode_equals_whole(trained, chunk):
    model, params, _, (mean, _) = trained
    whole = decode(model, params, mean)
    part = codec.decode_stream(model, params, mean, chunk)
    scale = jnp.max(jnp.abs(whole))
    np.testing.assert_allclose(part / scale, whole / scale, atol=1e-5)


@pytest.fixture(scope="module")
def shallow():
    """A decoder that sees 4 latent positions to each side, and the encoder with it."""
    model = CausalVAE(width=4, multipliers=(1,), blocks=0, time=(), space=(), patch=2, latent_channels=2)
    return model, battery.perturbed(model, normal(0, 1, 1, 8, 8, 3), std=0.3)


def test_tiles_with_enough_overlap_equal_the_whole(shallow):
    model, params = shallow
    z, video = normal(1, 1, 2, 40, 20, 2), normal(2, 1, 2, 80, 40, 3)
    tiled = codec.decode_tiled(model, params, z, tile=24, overlap=16)
    np.testing.assert_allclose(tiled, decode(model, params, z), rtol=1e-4, atol=1e-5)
    means, logvars = codec.encode_tiled(model, params, video, tile=24, overlap=16)
    mean, logvar = encode(model, params, video)
    np.testing.assert_allclose(means, mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logvars, logvar, rtol=1e-4, atol=1e-4)


def test_tiles_with_little_overlap_equal_the_whole_away_from_seams_and_nearly_at_them(shallow):
    model, params = shallow
    z = normal(1, 1, 1, 40, 8, 2)
    whole = decode(model, params, z)
    error = jnp.max(jnp.abs(codec.decode_tiled(model, params, z, tile=24, overlap=8) - whole), axis=(0, 1, 3, 4))
    seam = np.zeros(80, bool)
    seam[2 * 16 : 2 * 24] = True
    assert jnp.max(error[~seam]) < 1e-5
    assert 0 < jnp.max(error[seam]) < 0.2 * jnp.std(whole)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 4), (8, 7), (40, 4)])
def test_tiles_of_a_pointwise_map_leave_no_seam(tile, overlap):
    model = CausalVAE(width=4, multipliers=(1,), blocks=0, time=(), space=(), latent_channels=3)
    params = unboxed(model.init(jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3))))["params"]  # the identity, untrained
    z = normal(1, 1, 2, 21, 17, 3)
    np.testing.assert_allclose(codec.decode_tiled(model, params, z, tile, overlap), z, atol=1e-6)
    ones = codec.decode_tiled(model, params, jnp.ones_like(z), tile, overlap)
    np.testing.assert_allclose(ones, 1.0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_shapes_and_names_of_every_size(size):
    model = CausalVAE(**SIZES[size])
    video = jax.ShapeDtypeStruct((2, 9, 64, 32, 3), jnp.float32)
    params, (recon, mean, logvar) = battery.shapes(model, video)
    battery.every_leaf_has_names(params)
    assert recon.shape == video.shape and mean.shape == logvar.shape == (2, *model.latent_shape(9, 64, 32))
    assert mean.shape[1] == 1 + 8 // model.time_factor and mean.shape[2] == 64 // model.space_factor


def test_the_field_size_is_4x8x8_with_16_channels_and_about_100_million_parameters():
    model = CausalVAE(**SIZES["4x8x8"])
    assert (model.time_factor, model.space_factor, model.latent_channels) == (4, 8, 16)
    params, _ = battery.shapes(model, jax.ShapeDtypeStruct((1, 5, 16, 16, 3), jnp.float32))
    assert 80e6 < battery.count(params) < 130e6


def test_gradients_are_finite_and_none_is_zero(trained):
    model, params, video, _ = trained
    _, gradients = battery.loss_and_gradients(model, params, video[:, :5, :8])
    battery.gradients_are_finite_and_none_is_zero(gradients)


def test_remat_changes_nothing():
    model, video = MODELS["folded"], normal(0, 1, 5, 8, 8, 3)
    params = battery.perturbed(model, video)
    plain = battery.loss_and_gradients(model, params, video)
    battery.agrees(plain, battery.loss_and_gradients(model.clone(remat=True), params, video), rtol=1e-3, atol=1e-4)


def test_bf16_is_near_fp32():
    model, video = MODELS["folded"], normal(0, 1, 5, 8, 8, 3)
    battery.bf16_is_near_fp32(model, battery.perturbed(model, video), video, distance=0.1)


@pytest.mark.parametrize(("volume", "channels"), [((4, 4, 4), 16), ((4, 8, 8), 16), ((1, 2, 2), 3), ((1, 1, 1), 3)])
def test_a_model_starts_as_an_orthogonal_low_pass(volume, channels):
    """Latents to pixels and back is the identity; pixels to latents and back is a projection that keeps colour."""
    pixels = 3 * math.prod(volume)
    analysis = causal_vae.cosines(jax.random.key(0), (1, 1, 1, pixels, channels), jnp.float32, volume)[0, 0, 0]
    synthesis = causal_vae.cosines(jax.random.key(0), (1, 1, 1, channels, pixels), jnp.float32, volume)[0, 0, 0]
    np.testing.assert_allclose(synthesis @ analysis, np.eye(channels), atol=1e-5)
    np.testing.assert_allclose(analysis @ synthesis, (analysis @ synthesis).T, atol=1e-6)
    plain = jnp.repeat(jnp.asarray([0.5, -1.0, 0.2]), pixels // 3)  # pixels in the order of CausalFold: colour first
    np.testing.assert_allclose(plain @ analysis @ synthesis, plain, atol=1e-5)
    np.testing.assert_allclose((plain @ analysis)[:3], [0.5, -1.0, 0.2], atol=1e-5)


def test_an_untrained_tiny_model_already_shows_the_clip():
    model = CausalVAE(**SIZES["tiny"])
    rows = jnp.linspace(-1, 1, 32)
    video = jnp.broadcast_to(jnp.sin(3 * rows[:, None] + 2 * rows)[None, None, ..., None], (1, 5, 32, 32, 3))
    params = unboxed(jax.jit(model.init)(jax.random.key(0), video))["params"]
    recon, _, logvar = jax.jit(model.apply)({"params": params}, video)
    assert psnr(video, recon)[0] > 25 and jnp.max(logvar) < -5


def test_unit_latents_have_zero_mean_and_unit_variance_and_come_back():
    z = 3.0 + normal(0, 4, 3, 8, 8, 2) * jnp.asarray([0.1, 7.0])
    stats = codec.latent_stats(z)
    unit = codec.to_unit(z, stats)
    np.testing.assert_allclose(jnp.mean(unit, axis=(0, 1, 2, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(jnp.std(unit, axis=(0, 1, 2, 3)), 1.0, rtol=1e-5)
    np.testing.assert_allclose(codec.from_unit(unit, stats), z, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 16, 16, 8, 3), "16 frames are not 1 \\+ 4k; .* is 17"),
        ((1, 2, 16, 8, 3), "2 frames are not 1 \\+ 4k; .* is 1\\b"),
        ((1, 5, 18, 8, 3), "height 18 is not a multiple of 4.* is 16"),
        ((1, 5, 16, 3, 3), "width 3 is not a multiple of 4.* is 4"),
    ],
)
def test_a_size_that_does_not_fit_is_named_with_the_nearest_that_does(shape, words):
    model = MODELS["strided"]
    with pytest.raises(UserError, match=words):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_strides_tiles_and_chunks_that_do_not_fit_are_user_errors(shallow):
    model, params = shallow
    with pytest.raises(UserError, match="3 levels .* needs 2 strides"):
        jax.eval_shape(CausalVAE(multipliers=(1, 2, 2), time=(2,)).init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))
    with pytest.raises(UserError, match="latent_channels is 13: .* from 1 to 12"):
        jax.eval_shape(model.clone(latent_channels=13).init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))
    with pytest.raises(UserError, match="try 4"):
        codec.encode_stream(MODELS["strided"], {}, jnp.zeros((1, 5, 8, 8, 3)), 3)
    with pytest.raises(UserError, match="at least 1 latent frame"):
        codec.decode_stream(model, params, jnp.zeros((1, 2, 8, 8, 2)), 0)
    with pytest.raises(UserError, match="tiles of 4 latent positions cannot overlap by 4"):
        codec.decode_tiled(model, params, jnp.zeros((1, 2, 8, 8, 2)), 4, 4)
