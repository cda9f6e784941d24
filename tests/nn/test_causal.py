"""Causal convolution: two forms of one computation, torch's conv3d, causality, images and streams."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from einops import rearrange

from vgjax.nn.causal import CausalConv3D, CausalFold, CausalUnfold, CausalUpsample, conv3d_direct, conv3d_taps
from vgjax.parallel.sharding import unboxed

KERNELS = [
    ((3, 3, 3), (1, 1, 1)),
    ((3, 3, 3), (2, 2, 2)),
    ((1, 1, 1), (1, 1, 1)),
    ((3, 1, 1), (2, 1, 1)),
    ((1, 3, 3), (1, 2, 2)),
]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def made(x, **fields):
    conv = CausalConv3D(3, **fields)
    params = unboxed(conv.init(jax.random.key(0), x))["params"]
    params["bias"] = normal(9, 3)
    return conv, {"params": params}


@pytest.mark.parametrize(("kernel", "stride"), KERNELS)
def test_taps_equal_the_direct_convolution_in_value_and_gradient(kernel, stride):
    x, k = normal(0, 2, 7, 6, 4, 2), normal(1, *kernel, 2, 3)
    direct, pull = jax.vjp(lambda x, k: conv3d_direct(x, k, stride), x, k)
    taps, pull_taps = jax.vjp(lambda x, k: conv3d_taps(x, k, stride), x, k)
    seed = normal(2, *direct.shape)
    np.testing.assert_allclose(taps, direct, rtol=1e-4, atol=1e-4)
    for left, right in zip(pull_taps(seed), pull(seed), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_parity_with_torch_in_value_and_gradient(stride, padding):
    x = normal(0, 2, 5, 6, 4, 2)
    conv, variables = made(x, stride=stride, padding=padding)
    y, pull = jax.vjp(lambda v, x: conv.apply(v, x), variables, x)
    seed = normal(2, *y.shape)
    own, by_x = pull(seed)

    theirs = torch.tensor(rearrange(np.array(x), "b t h w c -> b c t h w"), requires_grad=True)
    kernel = rearrange(np.array(variables["params"]["kernel"]), "t h w c d -> d c t h w")
    kernel = torch.tensor(kernel, requires_grad=True)
    past = theirs[:, :, :1].repeat(1, 1, 2, 1, 1) * (padding == "replicate")
    bias = torch.tensor(np.array(variables["params"]["bias"]))
    out = torch.nn.functional.conv3d(torch.cat([past, theirs], 2), kernel, bias, stride=stride, padding=(0, 1, 1))
    out.backward(torch.tensor(rearrange(np.array(seed), "b t h w c -> b c t h w")))

    def ours(tensor, pattern):
        return rearrange(tensor.detach().numpy(), pattern)

    np.testing.assert_allclose(y, ours(out, "b c t h w -> b t h w c"), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_x, ours(theirs.grad, "b c t h w -> b t h w c"), rtol=1e-4, atol=1e-5)
    by_kernel = ours(kernel.grad, "d c t h w -> t h w c d")
    np.testing.assert_allclose(own["params"]["kernel"], by_kernel, rtol=1e-4, atol=1e-4)


def test_a_convolution_that_is_not_centred_pads_below_and_to_the_right():
    x = normal(0, 2, 3, 6, 4, 2)
    conv, variables = made(x, kernel=(1, 3, 3), stride=(1, 2, 2), centred=False)
    kernel = rearrange(np.array(variables["params"]["kernel"]), "1 h w c d -> d c h w")
    padded = torch.nn.ZeroPad2d((0, 1, 0, 1))(torch.tensor(rearrange(np.array(x), "b t h w c -> (b t) c h w")))
    bias = torch.tensor(np.array(variables["params"]["bias"]))
    out = torch.nn.functional.conv2d(padded, torch.tensor(kernel), bias, stride=2)
    theirs = rearrange(out.numpy(), "(b t) c h w -> b t h w c", b=2)
    np.testing.assert_allclose(conv.apply(variables, x), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
def test_one_frame_is_a_2d_convolution(padding):
    """By the last time tap under zeros, by the sum of the taps under replication."""
    x = normal(0, 2, 1, 6, 4, 2)
    conv, variables = made(x, padding=padding)
    kernel = variables["params"]["kernel"]
    kernel = kernel[-1] if padding == "zeros" else jnp.sum(kernel, axis=0)
    flat = jax.lax.conv_general_dilated(x[:, 0], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    flat = flat + variables["params"]["bias"]
    np.testing.assert_allclose(conv.apply(variables, x)[:, 0], flat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "replicate"])
@pytest.mark.parametrize(("kernel", "stride"), [*KERNELS, ((2, 1, 1), (2, 1, 1))])
def test_a_stream_of_chunks_equals_the_whole(kernel, stride, padding):
    x = normal(0, 1, 9, 4, 4, 2)
    conv, variables = made(x, kernel=kernel, stride=stride, padding=padding)
    whole = conv.apply(variables, x)
    for cuts in ([1, 3, 5], [3, 5], [5]):
        np.testing.assert_allclose(streamed(conv, variables, x, cuts), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("module", [CausalUpsample(2, 2), CausalUpsample(1, 2), CausalUnfold(2, 1)])
def test_a_stream_is_upsampled_like_the_whole(module):
    x = normal(0, 1, 5, 2, 2, 8)
    whole = module.apply({}, x)
    assert whole.shape[1] == (9 if module.time == 2 else 5)
    for cuts in ([1], [2, 3]):
        np.testing.assert_array_equal(streamed(module, {}, x, cuts), whole)


def test_nearest_upsampling_does_not_double_the_first_frame():
    x = jnp.arange(3.0)[None, :, None, None, None]
    y = CausalUpsample(2, 2).apply({}, x)
    assert y.shape == (1, 5, 2, 2, 1)
    np.testing.assert_array_equal(y[0, :, 1, 0, 0], [0, 1, 1, 2, 2])


def test_unfold_inverts_fold_alone_and_in_a_stream():
    x = normal(0, 2, 9, 4, 6, 3)
    folded = CausalFold(4, 2).apply({}, x)
    assert folded.shape == (2, 3, 2, 3, 48)
    np.testing.assert_array_equal(CausalUnfold(4, 2).apply({}, folded), x)
    np.testing.assert_array_equal(streamed(CausalFold(4, 2), {}, x, [1, 5]), folded)
    zeros = CausalFold(4, 2, "zeros").apply({}, x)
    np.testing.assert_array_equal(zeros[:, 1:], folded[:, 1:])
    padded = jnp.concatenate([jnp.zeros((2, 3, 4, 6, 3)), x], axis=1)
    np.testing.assert_array_equal(zeros, rearrange(padded, "b (t r) (h p) (w q) c -> b t h w (c r p q)", r=4, p=2, q=2))


def test_bf16_is_computed_in_bf16_near_fp32():
    x = normal(0, 1, 3, 4, 4, 8)
    conv, variables = made(x)
    half = conv.clone(dtype=jnp.bfloat16).apply(variables, x)
    assert half.dtype == jnp.bfloat16
    whole = conv.apply(variables, x)
    assert 0 < jnp.linalg.norm(half - whole) / jnp.linalg.norm(whole) < 0.02


def streamed(module, variables, x, cuts):
    cache, parts = {}, []
    for part in jnp.split(x, cuts, axis=1):
        out, state = module.apply({**variables, "cache": cache}, part, mutable=["cache"])
        cache = state.get("cache", {})
        parts.append(out)
    return jnp.concatenate(parts, axis=1)
