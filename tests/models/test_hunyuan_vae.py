"""HunyuanVideo's VAE: the reference's numbers and gradients, what is causal in it, tiles, devices, sizes and errors."""

import functools

import battery
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo
from einops import rearrange
from flax import linen as nn

from vgjax.attention import full
from vgjax.errors import UserError
from vgjax.models import hunyuan_vae
from vgjax.models.hunyuan_vae import SIZES, FrameAttention, HunyuanVAE, frame_causal
from vgjax.nn import codec
from vgjax.nn.causal import CausalConv3D
from vgjax.nn.norm import GroupNorm
from vgjax.open.published.hunyuan_vae import stats, weights
from vgjax.open.tables import entries
from vgjax.parallel import layouts, sharding
from vgjax.parallel.sharding import unboxed

torch.set_num_threads(1)

# Four levels as published, each with a width of its own: space, both, both, nothing.
MODEL = HunyuanVAE(channels=(4, 8, 12, 16), blocks=1, groups=4, latent_channels=3)
SMALL = HunyuanVAE(channels=(8, 16, 16), blocks=1, groups=4, latent_channels=3)
CASES = {
    "one frame": (MODEL, (2, 1, 16, 24)),
    "five frames": (MODEL, (2, 5, 24, 16)),
    "nine frames": (MODEL, (1, 9, 8, 32)),
    "latents of one pixel": (MODEL.clone(groups=1), (1, 5, 8, 8)),
    "two blocks of equal widths, norms of two channels": (
        HunyuanVAE(channels=(8, 8, 16, 16), blocks=2, groups=4, latent_channels=4),
        (1, 5, 16, 24),
    ),
    "three levels, the last strides space": (
        HunyuanVAE(channels=(4, 8, 8), blocks=1, groups=2, latent_channels=2),
        (1, 9, 24, 16),
    ),
    "five levels": (HunyuanVAE(channels=(4, 4, 8, 8, 8), blocks=1, groups=2, latent_channels=5), (1, 9, 16, 24)),
    "four times less space, a level that strides time alone": (
        HunyuanVAE(channels=(4, 8, 8, 12), blocks=1, groups=4, latent_channels=2, space_factor=4),
        (2, 5, 12, 20),
    ),
}


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def reference(model, device="cpu"):
    levels = len(model.channels)
    with torch.device(device):
        return AutoencoderKLHunyuanVideo(
            latent_channels=model.latent_channels,
            down_block_types=("HunyuanVideoDownBlock3D",) * levels,
            up_block_types=("HunyuanVideoUpBlock3D",) * levels,
            block_out_channels=model.channels,
            layers_per_block=model.blocks,
            norm_num_groups=model.groups,
            spatial_compression_ratio=model.space_factor,
            temporal_compression_ratio=model.time_factor,
        )


@functools.cache
def both(model):
    """The reference with random weights, and our parameters of the same."""
    theirs = parity.randomised(reference(model))
    return theirs, parity.load(weights(model), model, theirs, jnp.zeros((1, 1, 16, 16, 3)))


def run(model, method, params, x):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, x)


def latents(model, video, seed=1):
    return normal(seed, video[0], *model.latent_shape(*video[1:]))


@pytest.mark.parametrize("case", CASES)
def test_encodes_like_diffusers(case):
    model, shape = CASES[case]
    theirs, params = both(model)
    video = normal(0, *shape, 3)
    with torch.no_grad():
        posterior = theirs.encode(parity.to_torch(video)).latent_dist
    mean, logvar = run(model, "encode", params, video)
    parity.near(mean, parity.of_torch(posterior.mean))
    parity.near(logvar, parity.of_torch(posterior.logvar))
    assert mean.shape == (shape[0], *model.latent_shape(*shape[1:])) and mean.dtype == logvar.dtype == jnp.float32


@pytest.mark.parametrize("case", CASES)
def test_decodes_like_diffusers(case):
    model, shape = CASES[case]
    theirs, params = both(model)
    z = latents(model, shape)
    with torch.no_grad():
        expected = theirs.decode(parity.to_torch(z)).sample
    video = run(model, "decode", params, z)
    parity.near(video, parity.of_torch(expected))
    assert video.shape == (*shape, 3) and video.dtype == jnp.float32


def test_the_log_variance_is_clipped():
    _, params = both(MODEL)
    params = {**params, "quant": {**params["quant"], "bias": jnp.asarray([0.0, 0.0, 0.0, 99.0, -99.0, 99.0])}}
    mean, logvar = run(MODEL, "encode", params, normal(0, 1, 1, 8, 8, 3))
    np.testing.assert_array_equal(np.unique(logvar), [-30.0, 20.0])
    assert np.abs(mean).max() < 20


@pytest.fixture(scope="module")
def base():
    """Parameters of the reference, a video, loss and gradients."""
    _, params = both(SMALL)
    video = normal(0, 1, 5, 8, 64, 3)
    return params, video, battery.loss_and_gradients(SMALL, params, video)


def test_gradients_are_those_of_torch(base):
    _, video, (value, gradients) = base
    theirs, _ = both(SMALL)
    theirs.zero_grad()
    posterior = theirs.encode(parity.to_torch(video)).latent_dist
    loss = 0.0
    for x in (theirs.decode(posterior.mean).sample, posterior.mean, posterior.logvar):
        x = rearrange(x, "b c t h w -> b t h w c")
        loss = loss + (x - torch.arange(x.numel(), dtype=torch.float32).reshape(x.shape).sin()).square().mean()
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    parity.same_gradients(weights(SMALL), gradients, theirs)


def test_gradients_are_finite_and_none_is_zero(base):
    battery.gradients_are_finite_and_none_is_zero(base[2][1])


def test_remat_changes_nothing(base):
    params, video, plain = base
    again = battery.loss_and_gradients(SMALL.clone(remat=True), params, video)
    battery.agrees(plain, again, rtol=1e-3, atol=1e-4)


def test_bf16_is_near_fp32(base):
    battery.bf16_is_near_fp32(SMALL, *base[:2])


def test_the_published_size_has_exactly_the_parameters_of_the_reference():
    model = HunyuanVAE(**SIZES["hunyuan"])
    video = jax.ShapeDtypeStruct((1, 5, 16, 24, 3), jnp.float32)
    params, (recon, mean, logvar) = battery.shapes(model, video)
    theirs = reference(model, "meta")
    assert battery.count(params) == sum(p.numel() for p in theirs.parameters())
    assert {name: tuple(p.shape) for name, p in theirs.state_dict().items()} == {
        entry.name: entry.shape for entry in entries(weights(model), unboxed(params))
    }
    battery.every_leaf_has_names(params)
    assert recon.shape == video.shape and mean.shape == logvar.shape == (1, 2, 2, 3, 16)
    assert (theirs.config.scaling_factor, model.time_factor, model.space_factor) == (0.476986, 4, 8)
    assert stats(theirs.config) == ([0.0] * 16, [1 / 0.476986] * 16)


@pytest.fixture(scope="module")
def trained():
    """A model, parameters away from their initialisation, a video and latents."""
    video = normal(0, 1, 9, 16, 8, 3)
    return battery.perturbed(MODEL, video), video, latents(MODEL, video.shape[:4])


def without_statistics(call, args, kwargs, context):
    """An interceptor under which each GroupNorm returns what it is given."""
    if isinstance(context.module, GroupNorm) and context.method_name == "__call__":
        return args[0]
    return call(*args, **kwargs)


@pytest.mark.parametrize("t", [0, 1])
def test_but_for_the_statistics_of_its_norms_nothing_sees_the_future(trained, t):
    params, video, z = trained
    params = jax.tree.map(lambda leaf: 0.3 * leaf, params)  # without norms numbers would grow out of fp32
    other, other_z = video.at[:, 4 * t + 1 :].add(1.0), z.at[:, t + 1 :].add(1.0)
    with nn.intercept_methods(without_statistics):
        mean, changed = (run(MODEL, "encode", params, x)[0] for x in (video, other))
        pixels, changed_pixels = (run(MODEL, "decode", params, x) for x in (z, other_z))
    np.testing.assert_array_equal(changed[:, : t + 1], mean[:, : t + 1])
    assert jnp.all(jnp.any(changed[:, t + 1 :] != mean[:, t + 1 :], axis=(0, 2, 3, 4)))
    np.testing.assert_array_equal(changed_pixels[:, : 4 * t + 1], pixels[:, : 4 * t + 1])
    assert jnp.all(jnp.any(changed_pixels[:, 4 * t + 1 :] != pixels[:, 4 * t + 1 :], axis=(0, 2, 3, 4)))


def test_through_them_the_first_latent_knows_the_last_frame(trained):
    params, video, _ = trained
    mean, changed = (run(MODEL, "encode", params, x)[0] for x in (video, video.at[:, -1].add(1.0)))
    assert jnp.any(changed[:, 0] != mean[:, 0])


def test_attention_frame_by_frame_is_masked_attention():
    q, k, v = (normal(i, 2, 3, 2, 5, 1, 8) for i in range(3))
    flat = [rearrange(a, "b t h w n k -> b (t h w) n k") for a in (q, k, v)]
    frame = np.repeat(np.arange(3), 10)
    scores = jnp.einsum("bnhk,bmhk->bhnm", flat[0], flat[1]) / 8**0.5
    seen = jax.nn.softmax(jnp.where(frame[:, None] >= frame, scores, -jnp.inf), axis=-1)
    o = rearrange(jnp.einsum("bhnm,bmhk->bnhk", seen, flat[2]), "b (t h w) n k -> b t h w n k", t=3, h=2)
    np.testing.assert_allclose(frame_causal(q, k, v), o, atol=1e-5)
    np.testing.assert_allclose(frame_causal(q[:, :, :, 2:4], k, v), o[:, :, :, 2:4], atol=1e-5)


def test_a_head_too_wide_for_the_kernels_of_accelerators_takes_none(monkeypatch):
    q, k, v = (normal(i, 1, 1, 32, 32, 1, 256) for i in range(3))
    expected = frame_causal(q, k, v)
    monkeypatch.setattr(full, "splash", lambda *_: pytest.fail("splash"))
    monkeypatch.setattr(full, "platform", lambda: "tpu")
    np.testing.assert_allclose(frame_causal(q, k, v), expected, atol=1e-5)


def test_attention_of_ten_thousand_positions_holds_a_chunk_of_scores():
    """Its scores, all at once, would be 400 MB."""
    model, x = FrameAttention(groups=1), jax.ShapeDtypeStruct((1, 10, 32, 32, 4), jnp.float32)
    params = unboxed(jax.eval_shape(model.init, jax.random.key(0), x))
    memory = jax.jit(model.apply).lower(params, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 60e6


@pytest.mark.parametrize("frames", [13, 17, 21, 25, 41])
def test_longer_videos_go_in_overlapping_clips_as_in_diffusers(frames):
    theirs, params = both(SMALL)
    video = normal(0, 1, frames, 16, 24, 3)
    z = latents(SMALL, video.shape[:-1])
    with torch.no_grad():
        expected, posterior = (
            theirs.decode(parity.to_torch(z)).sample,
            theirs.encode(parity.to_torch(video)).latent_dist,
        )
    parity.near(hunyuan_vae.decode_clips(SMALL, params, z), parity.of_torch(expected))
    mean, logvar = hunyuan_vae.encode_clips(SMALL, params, video)
    parity.near(mean, parity.of_torch(posterior.mean))
    parity.near(logvar, parity.of_torch(posterior.logvar))


def test_tiles_without_overlap_are_those_of_diffusers():
    theirs, params = both(SMALL)
    z, video = normal(1, 1, 2, 4, 6, 3), normal(0, 1, 5, 32, 48, 3)
    sides = {f"tile_sample_{which}_{side}": 16 for which in ("min", "stride") for side in ("height", "width")}
    try:
        theirs.enable_tiling(**sides)
        with torch.no_grad():
            expected, posterior = (
                theirs.decode(parity.to_torch(z)).sample,
                theirs.encode(parity.to_torch(video)).latent_dist,
            )
    finally:
        theirs.disable_tiling()
    decoded = codec.decode_tiled(SMALL, params, z, tile=2, overlap=0)
    parity.near(decoded, parity.of_torch(expected))
    means, _ = codec.encode_tiled(SMALL, params, video, tile=2, overlap=0)
    parity.near(means, parity.of_torch(posterior.mean))
    whole = run(SMALL, "decode", params, z)
    assert 0.01 < jnp.std(decoded - whole) / jnp.std(whole)  # each tile has statistics of its own


def test_a_tile_as_large_as_the_picture_is_the_whole(trained):
    params, _, z = trained
    whole = run(MODEL, "decode", params, z)
    np.testing.assert_allclose(codec.decode_tiled(MODEL, params, z, tile=4, overlap=2), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel,stride", [((3, 3, 3), (1, 1, 1)), ((3, 3, 3), (2, 2, 2)), ((1, 5, 5), (1, 1, 1))])
@pytest.mark.parametrize("width", [16, 12, 8])
def test_a_convolution_padded_with_edges_is_the_same_with_its_width_on_eight_devices(kernel, stride, width):
    """Of 16 columns each device has two, 12 do not divide, and of 8 each has one: too few for a stride, or for five."""
    conv, x = CausalConv3D(4, kernel, stride, padding="edge"), normal(0, 2, 5, 6, width, 3)
    variables = unboxed(conv.init(jax.random.key(0), x))

    def loss(variables, x):
        y = conv.apply(variables, x)
        return jnp.sum(jnp.sin(y + jnp.arange(y.size).reshape(y.shape))), y

    grad = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (whole, y), (many, spread) = jax.jit(grad)(variables, x), spread_out(grad, variables, x)
    np.testing.assert_allclose(spread, y, rtol=1e-5, atol=1e-5)
    battery.agrees(many, whole, atol=1e-4)
    padded = np.pad(x, ((0, 0), (kernel[0] - 1, 0), *(((k // 2,) * 2) for k in kernel[1:]), (0, 0)), mode="edge")
    bare = jax.lax.conv_general_dilated(
        padded, variables["params"]["kernel"], stride, "VALID", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    np.testing.assert_allclose(y, bare, rtol=1e-5, atol=1e-5)


def spread_out(function, variables, x):
    """`function` on eight devices that share the width of `x`, and of what is made of it."""
    layout, mesh = layouts.find("ulysses", 8)
    with sharding.use(layout, mesh):
        return jax.device_get(jax.jit(lambda v, x: function(v, sharding.shard(x, *SPREAD)))(variables, x))


SPREAD = ("batch", None, None, "width", None)


def test_eight_devices_that_share_the_width_are_the_same_as_one(base):
    params, video, _ = base
    alone = jax.jit(SMALL.apply)({"params": params}, video)
    for a, b in zip(spread_out(SMALL.apply, {"params": params}, video), alone, strict=True):
        parity.near(a, b)


def test_so_are_the_gradients_of_attention():
    model, x = FrameAttention(groups=2), normal(0, 1, 3, 2, 8, 4)
    params = battery.perturbed(model, x)
    grad = jax.grad(lambda p, x: jnp.sum(jnp.sin(model.apply({"params": p}, x))), argnums=(0, 1))
    battery.agrees(spread_out(grad, params, x), jax.jit(grad)(params, x), atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 16, 16, 8, 3), "16 frames are not 1 \\+ 4k; .* is 17"),
        ((1, 5, 18, 8, 3), "height 18 is not a multiple of 8.* is 16"),
        ((1, 5, 16, 3, 3), "width 3 is not a multiple of 8.* is 8"),
    ],
)
def test_a_size_that_does_not_fit_is_named_with_the_nearest_that_does(shape, words):
    with pytest.raises(UserError, match=words):
        jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros(shape))
    with pytest.raises(UserError, match=words):
        MODEL.latent_shape(*shape[1:4])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(channels=(4, 8, 10, 16)), "do not all divide into 4 groups; instead of 10 use 8"),
        (dict(channels=(4, 8)), "2 levels cannot compress time 4 and space 8 times: .* at most 2 and 4"),
        (dict(space_factor=6), "4 levels cannot compress time 4 and space 6 times: use powers of two"),
    ],
)
def test_a_model_that_cannot_be_is_a_user_error(fields, words):
    with pytest.raises(UserError, match=words):
        jax.eval_shape(MODEL.clone(**fields).init, jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))


def test_a_stream_is_refused(trained):
    params, video, z = trained
    for stream, x, chunk in ((codec.encode_stream, video, 4), (codec.decode_stream, z, 1)):
        with pytest.raises(UserError, match="cannot go on with a stream"):
            jax.eval_shape(functools.partial(stream, MODEL, chunk=chunk), params, x)


@pytest.mark.parametrize(
    ("levels", "time", "space", "expected"),
    [
        (4, 4, 8, ((1, 2), (2, 2), (2, 2), (1, 1))),
        (3, 4, 8, ((2, 2), (2, 2), (1, 2))),
        (5, 4, 8, ((1, 2), (1, 2), (2, 2), (2, 1), (1, 1))),
    ],
)
def test_space_is_strided_first_and_time_last(levels, time, space, expected):
    assert hunyuan_vae.strides(levels, time, space) == expected
