"""Wan's VAEs: the numbers of the reference, its streams, causality, sizes, gradients, and a width over devices."""

import inspect

import battery
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from einops import rearrange

from vgjax.errors import UserError
from vgjax.models.wan_vae import SIZES, WanVAE
from vgjax.nn import codec
from vgjax.open import tables
from vgjax.open.published.wan_vae import stats, weights
from vgjax.parallel import layouts, sharding

# Each with the video (batch, frames, height, width) that it is compared on.
CASES = {
    "2.1": (dict(width=6, blocks=1, latent_channels=4), (1, 9, 16, 24)),
    "2.1 time first": (dict(width=4, multipliers=(1, 2), blocks=2, time=(2,), latent_channels=3), (2, 5, 8, 12)),
    "2.1 of an image": (dict(width=6, multipliers=(2, 1, 3), blocks=1, time=(2, 1), latent_channels=2), (2, 1, 12, 8)),
    "2.1 frame by frame": (dict(width=4, multipliers=(1, 1, 2), blocks=1, time=(1, 1)), (1, 5, 8, 4)),
    "2.2": (dict(width=4, decoder_width=6, latent_channels=6, patch=2, shortcuts=True), (1, 9, 32, 16)),
    "2.2 time first": (dict(width=4, multipliers=(2, 1), blocks=2, time=(2,), shortcuts=True), (2, 5, 4, 6)),
    "2.2 of an image": (
        dict(width=6, multipliers=(2, 1, 1), blocks=1, time=(2, 1), latent_channels=2, patch=2, shortcuts=True),
        (2, 1, 8, 16),
    ),
    "2.2 time twice": (
        dict(width=4, decoder_width=2, multipliers=(1, 4, 2), blocks=1, time=(2, 2), patch=2, shortcuts=True),
        (1, 9, 16, 8),
    ),
}
TINY = dict(width=4, multipliers=(1, 2, 2), blocks=1, time=(2, 2), latent_channels=4)
MODELS = {"2.1": WanVAE(**TINY), "2.2": WanVAE(**TINY, decoder_width=6, patch=2, shortcuts=True)}
# One stride in space and time: everything that a gradient can take.
SHALLOW = {form: model.clone(multipliers=(2, 1), time=(2,)) for form, model in MODELS.items()}
FACTORS = {"wan2.1": (4, 8, 16), "wan2.2": (4, 16, 48)}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def reference(model, device="cpu"):
    import torch
    from diffusers import AutoencoderKLWan

    torch.set_num_threads(1)
    with torch.device(device):
        return AutoencoderKLWan(
            base_dim=model.width,
            decoder_base_dim=model.decoder_width,
            z_dim=model.latent_channels,
            dim_mult=list(model.multipliers),
            num_res_blocks=model.blocks,
            temperal_downsample=[stride == 2 for stride in model.time],
            is_residual=model.shortcuts,
            in_channels=3 * model.patch**2,
            out_channels=3 * model.patch**2,
            patch_size=model.patch if model.patch > 1 else None,
            scale_factor_spatial=model.space_factor,
        )


def random_reference(model):
    """With pixels well inside of [-1, 1], to which the reference clips and we do not."""
    import torch

    theirs = parity.randomised(reference(model))
    with torch.no_grad():
        for parameter in theirs.decoder.conv_out.parameters():
            parameter *= 0.1
    return theirs


def run(theirs, video):
    """`(reconstruction of the mean, mean, logvar)` of the reference, with gradients."""

    posterior = theirs.encode(parity.to_torch(video)).latent_dist
    out = theirs.decode(posterior.mean).sample, posterior.mean, posterior.logvar
    assert out[0].abs().max() < 1
    return out


def is_near(ours, theirs):
    for own, other in zip(ours, theirs, strict=True):
        parity.near(own, parity.of_torch(other))


@pytest.mark.parametrize("case", CASES)
def test_equals_diffusers_wan_with_the_same_weights(case):
    fields, shape = CASES[case]
    model, video = WanVAE(**fields), jax.random.uniform(jax.random.key(0), (*shape, 3), minval=-1.0)
    theirs = random_reference(model)
    params = parity.load(weights(model), model, theirs, video)
    is_near(jax.jit(model.apply)({"params": params}, video), run(theirs, video))


def test_small_activations_are_normed_as_in_the_reference():
    import torch

    model, video = SHALLOW["2.1"], normal(0, 1, 1, 4, 4, 3)
    theirs = random_reference(model)
    with torch.no_grad():
        for parameter in theirs.encoder.conv_in.parameters():
            parameter *= 1e-8
    params = parity.load(weights(model), model, theirs, video)
    is_near(jax.jit(model.apply)({"params": params}, video), run(theirs, video))


@pytest.mark.parametrize(("form", "remat"), [("2.1", False), ("2.2", True)])
def test_gradients_equal_those_of_the_reference_and_none_is_zero(form, remat):
    model, video = SHALLOW[form].clone(remat=remat), normal(0, 1, 5, 8, 4, 3)
    theirs = random_reference(model)
    params = parity.load(weights(model), model, theirs, video)
    expected = run(theirs, video)
    towards = [np.random.default_rng(i).standard_normal(out.shape).astype(np.float32) for i, out in enumerate(expected)]

    def loss(params):
        outs = model.apply({"params": params}, video)
        targets = (rearrange(target, "b c t h w -> b t h w c") for target in towards)
        return sum(jnp.sum(out * target) for out, target in zip(outs, targets, strict=True))

    sum((out * out.new_tensor(target)).sum() for out, target in zip(expected, towards, strict=True)).backward()
    wanted = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    gradients = jax.jit(jax.grad(loss))(params)
    battery.gradients_are_finite_and_none_is_zero(gradients)
    for name, ours in tables.export(weights(model), gradients):
        assert np.linalg.norm(ours - wanted[name]) <= 1e-3 * np.linalg.norm(wanted[name]), name


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_have_names_and_exactly_the_parameters_of_the_reference(size):
    model = WanVAE(**SIZES[size])
    video = jax.ShapeDtypeStruct((1, 5, 32, 16, 3), jnp.float32)
    params, (recon, mean, logvar) = battery.shapes(model, video)
    battery.every_leaf_has_names(params)
    theirs = reference(model, "meta")
    assert battery.count(params) == sum(parameter.numel() for parameter in theirs.parameters())
    given = {name: (tuple(tensor.shape), "float32") for name, tensor in theirs.state_dict().items()}
    assert not tables.mismatches(weights(model), sharding.unboxed(params), given)
    assert (model.time_factor, model.space_factor, model.latent_channels) == FACTORS[size]
    assert recon.shape == video.shape and mean.shape == logvar.shape == (1, *model.latent_shape(5, 32, 16))
    assert recon.dtype == mean.dtype == logvar.dtype == jnp.float32


def test_sizes_and_statistics_of_2_1_are_the_defaults_of_the_reference():
    import diffusers

    defaults = inspect.signature(diffusers.AutoencoderKLWan.__init__).parameters
    model = WanVAE(**SIZES["wan2.1"])
    assert (model.width, model.latent_channels) == (defaults["base_dim"].default, defaults["z_dim"].default)
    assert model.multipliers == tuple(defaults["dim_mult"].default)
    assert model.time == tuple(1 + flag for flag in defaults["temperal_downsample"].default)
    assert model.blocks == defaults["num_res_blocks"].default
    mean, std = (tuple(defaults[name].default) for name in ("latents_mean", "latents_std"))
    assert tuple(map(tuple, stats({"latents_mean": mean, "latents_std": std}))) == (mean, std)
    assert len(mean) == len(std) == model.latent_channels


@pytest.fixture(scope="module", params=MODELS)
def trained(request):
    """A model, random parameters, a video, its encoding, and the decoding of that."""
    model, video = MODELS[request.param], normal(0, 1, 17, 16, 8, 3)
    params = battery.perturbed(model, video)
    encoded = encode(model, params, video)
    return model, params, video, encoded, decode(model, params, encoded[0])


def encode(model, params, video):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))(params, video)


def decode(model, params, z):
    return jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))(params, z)


def is_the_same(ours, whole):
    scale = jnp.std(whole)
    np.testing.assert_allclose(ours / scale, whole / scale, atol=1e-5)


@pytest.mark.parametrize("chunk", [4, 8])
def test_streaming_encode_equals_whole(trained, chunk):
    model, params, video, whole, _ = trained
    for part, all_ in zip(codec.encode_stream(model, params, video, chunk), whole, strict=True):
        is_the_same(part, all_)


@pytest.mark.parametrize("chunk", [2, 3])
def test_streaming_decode_equals_whole(trained, chunk):
    model, params, _, (mean, _), whole = trained
    is_the_same(codec.decode_stream(model, params, mean, chunk), whole)


def test_a_stream_of_single_frames_equals_the_whole(trained):
    """As the reference goes: one frame, then four at a time; one latent at a time."""
    model, params, video, (mean, logvar), whole = trained
    moments = streamed(model, params, "encode", video, [1, 5, 9, 13])
    for parts, all_ in zip(zip(*moments, strict=True), (mean, logvar), strict=True):
        is_the_same(jnp.concatenate(parts, axis=1), all_)
    is_the_same(jnp.concatenate(streamed(model, params, "decode", mean, [1, 2, 3, 4]), axis=1), whole)


def streamed(model, params, method, x, cuts):
    step = jax.jit(lambda cache, x: model.apply({"params": params, "cache": cache}, x, method=method, mutable="cache"))
    cache, outs = {}, []
    for part in jnp.split(x, cuts, axis=1):
        out, state = step(cache, part)
        cache = state["cache"]
        outs.append(out)
    return outs


@pytest.mark.parametrize("t", [0, 2])
def test_latent_t_ignores_future_frames(trained, t):
    model, params, video, (mean, logvar), _ = trained
    other = video.at[:, 4 * t + 1 :].add(1.0)
    changed, changed_logvar = encode(model, params, other)
    np.testing.assert_array_equal(changed[:, : t + 1], mean[:, : t + 1])
    np.testing.assert_array_equal(changed_logvar[:, : t + 1], logvar[:, : t + 1])
    assert jnp.all(jnp.any(changed[:, t + 1 :] != mean[:, t + 1 :], axis=(0, 2, 3, 4)))


@pytest.mark.parametrize("t", [0, 2])
def test_frames_of_latent_t_ignore_future_latents(trained, t):
    model, params, _, (mean, _), whole = trained
    changed = decode(model, params, mean.at[:, t + 1 :].add(1.0))
    np.testing.assert_array_equal(changed[:, : 4 * t + 1], whole[:, : 4 * t + 1])
    assert jnp.all(jnp.any(changed[:, 4 * t + 1 :] != whole[:, 4 * t + 1 :], axis=(0, 2, 3, 4)))


def test_an_image_is_the_first_frame_of_a_video(trained):
    model, params, video, (mean, _), whole = trained
    first, _ = encode(model, params, video[:, :1])
    is_the_same(first, mean[:, :1])
    is_the_same(decode(model, params, first), whole[:, :1])


def test_log_variances_are_clipped():
    model, video = SHALLOW["2.1"], normal(0, 1, 1, 4, 4, 3)
    params = battery.perturbed(model, video)
    params["to_latent"]["bias"] = jnp.asarray([0.0] * 4 + [-1e3, -1e3, 1e3, 1e3])
    _, logvar = encode(model, params, video)
    np.testing.assert_array_equal(logvar[0, 0, 0, 0], [-30, -30, 20, 20])


@pytest.mark.parametrize("form", MODELS)
def test_bf16_is_near_fp32(form):
    model, video = SHALLOW[form], normal(0, 1, 5, 8, 4, 3)
    battery.bf16_is_near_fp32(model, battery.perturbed(model, video), video)


def test_a_width_over_eight_devices_gives_the_numbers_and_gradients_of_one():
    model, video = SHALLOW["2.2"], normal(0, 1, 3, 8, 32, 3)
    params = battery.perturbed(model, video)

    def run(params):
        def loss(params):
            recon, mean, logvar = model.apply({"params": params}, video)
            return jnp.mean(jnp.sin(recon)) + jnp.mean(jnp.sin(mean + logvar)), recon

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    one = jax.device_get(run(params))
    with sharding.use(*layouts.find("ulysses", 8)):
        many = run(params)
    assert many[1].sharding.spec[3] == "sequence"
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(many), jax.tree.leaves(one), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("fields", "shape", "words"),
    [
        ({}, (1, 16, 16, 8, 3), "16 frames are not 1 \\+ 4k; .* is 17"),
        ({}, (1, 5, 18, 8, 3), "height 18 is not a multiple of 8.* is 16"),
        ({}, (1, 5, 16, 3, 3), "width 3 is not a multiple of 8.* is 8"),
        (dict(time=(2,)), (1, 5, 16, 8, 3), "3 levels .* needs 2 strides in time, each 1 or 2, but time is \\(2,\\)"),
        (dict(time=(2, 4)), (1, 5, 16, 8, 3), "each 1 or 2, but time is \\(2, 4\\)"),
        (dict(multipliers=(1, 2, 3)), (1, 5, 16, 8, 3), "between levels of 8 and 12 channels of the encoder"),
        (dict(multipliers=(1, 1, 8, 8), time=(1, 1, 2)), (1, 5, 16, 16, 3), "of 6 and 48 channels of the decoder"),
    ],
)
def test_what_does_not_fit_is_a_user_error(fields, shape, words):
    model = MODELS["2.2"].clone(**fields)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape))


def test_a_stream_goes_on_by_whole_latents():
    model, video = MODELS["2.1"], normal(0, 1, 4, 8, 4, 3)
    params = battery.perturbed(model, video[:, :1])

    def encode_two_chunks(video):
        _, state = model.apply({"params": params}, video[:, :1], method="encode", mutable=["cache"])
        model.apply({"params": params, **state}, video[:, 1:], method="encode", mutable=["cache"])

    with pytest.raises(UserError, match="3 frames are not 4k; .* is 4"):
        jax.eval_shape(encode_two_chunks, video)
