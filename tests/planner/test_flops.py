"""The count of a traced program equals what one writes down by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from vgjax.attention.splash import splash
from vgjax.nn.stack import REMAT
from vgjax.planner import flops


def shape(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def block(x, w):
    return jnp.tanh(x @ w)


def twice(x, w):
    return block(block(x, w), w)


X, W, ONE = shape(6, 8), shape(8, 8), 2 * 6 * 8 * 8


def test_hunyuan_video_forward_is_12_pflop():
    """The published figure is 12.07 PFLOP, 87 % of it attention, for 118,800 video and 256 text tokens.

    The tolerances are the rounding of the published figures: half of their last digit.
    """
    size = dict(dim=3072, mlp_ratio=4, double_blocks=20, single_blocks=40, video_tokens=118_800, text_tokens=256)
    total = flops.mmdit_forward(**size)
    assert total == pytest.approx(12.07e15, abs=0.005e15)
    attention = 60 * 4 * (118_800 + 256) ** 2 * 3072
    assert attention / total == pytest.approx(0.87, abs=0.005)
    assert flops.mmdit_forward(**size, patch_dim=64, text_dim=4096) == pytest.approx(total, rel=1e-3)
    assert flops.training(total) == 3 * total


def test_closed_form_equals_the_count_of_a_block_written_out():
    tokens, dim, heads, ratio = 24, 16, 2, 4

    def transformer(x, qkv, out, up, down):
        q, k, v = jnp.split((x @ qkv).reshape(tokens, 3 * heads, -1), 3, 1)
        weights = jax.nn.softmax(jnp.einsum("nhk,mhk->hnm", q, k))
        x = x + jnp.einsum("hnm,mhk->nhk", weights, v).reshape(tokens, dim) @ out
        return x + jax.nn.gelu(x @ up) @ down

    shapes = [(tokens, dim), (dim, 3 * dim), (dim, dim), (dim, ratio * dim), (ratio * dim, dim)]
    counted = flops.count(transformer, *[shape(*dims) for dims in shapes])
    assert counted == flops.mmdit_forward(dim, ratio, 1, 0, tokens - 5, 5)
    assert counted == flops.mmdit_forward(dim, ratio, 0, 1, 4, tokens - 4)


def test_batched_matmul_counts_two_per_multiply_add():
    matmul = functools.partial(jnp.einsum, "bij,bjk->bik")
    assert flops.count(matmul, shape(5, 2, 3), shape(5, 3, 4)) == 2 * 5 * 2 * 3 * 4


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 1), (1, 2)])
def test_conv3d_counts_kernel_times_output(groups, stride):
    video, kernel = shape(2, 5, 8, 8, 4), shape(3, 3, 3, 4 // groups, 6)

    def conv(x, w):
        numbers = lax.conv_dimension_numbers(x.shape, w.shape, ("NTHWC", "THWIO", "NTHWC"))
        return lax.conv_general_dilated(
            x, w, (1, stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    out = math.prod((2, 5, 8 // stride, 8 // stride, 6))
    assert flops.count(conv, video, kernel) == 2 * out * 27 * 4 // groups


@pytest.mark.parametrize(
    ("name", "fn", "times"),
    [
        ("jit", lambda x, w: jax.jit(block)(x, w), 1),
        ("remat", lambda x, w: jax.checkpoint(block)(x, w), 1),
        ("scan", lambda x, w: lax.scan(lambda c, _: (block(c, w), None), x, length=7)[0], 7),
        ("map in scan", lambda x, w: lax.scan(lambda c, _: (lax.map(lambda r: r @ w, c), None), x, length=3)[0], 3),
        ("scan of remat", lambda x, w: lax.scan(jax.checkpoint(lambda c, _: (block(c, w), None)), x, length=4)[0], 4),
        ("cond takes what runs where it holds", lambda x, w: lax.cond(x[0, 0] > 0, twice, block, x, w), 2),
        ("gradient by both operands", jax.grad(lambda x, w: block(x, w).sum(), (0, 1)), 3),
    ],
)
def test_count_looks_inside(name, fn, times):
    assert flops.count(fn, X, W) == times * ONE


def test_count_looks_inside_custom_derivatives():
    custom = jax.custom_vjp(block)
    custom.defvjp(lambda x, w: (block(x, w), (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))
    forward_mode = jax.custom_jvp(block)
    forward_mode.defjvp(lambda primals, tangents: (block(*primals), tangents[0]))
    assert flops.count(custom, X, W) == ONE
    assert flops.count(forward_mode, X, W) == ONE
    both = jax.value_and_grad(lambda x, w: custom(x, w).sum(), (0, 1))
    assert flops.count(both, X, W) == 3 * ONE  # without the value the forward pass would be dead


def test_shard_map_counts_the_work_of_all_its_devices():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("data")
    fn = jax.shard_map(block, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    assert flops.count(fn, X, W) == ONE


def test_a_kernel_counts_the_work_of_its_tiles():
    q, k = shape(3, 600, 2, 16), shape(3, 1200, 2, 16)
    tiles = 2 * (3 * 640 * 1280 * 2 * 16)  # one matmul, padded to tiles
    assert flops.count(lambda q, k: splash(q, k, k, None), q, k) == 2 * tiles
    both = jax.grad(lambda q, k: splash(q, k, k, None).sum(), (0, 1))
    assert flops.count(both, q, k) == pytest.approx((2 + 3 + 4) * tiles, rel=1e-3)  # forward; dq; dk and dv


def test_peak_is_that_of_one_device_and_none_where_it_is_unknown():
    kinds = {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "TPU v4": 275e12,
        "TPU v5 lite": 197e12,
        "TPU v5p": 459e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "TPU7x": 2307e12 / 2,
    }
    assert {kind: flops.peak(kind, jnp.bfloat16) for kind in kinds} == kinds
    assert flops.peak("NVIDIA A100-SXM4-80GB", jnp.float32) == 156e12
    assert flops.peak("TPU v4", jnp.float32) == 275e12
    assert flops.peak("cpu", jnp.float32) is None and flops.peak("TPU v4", jnp.int8) is None
    assert flops.peak(jax.devices("cpu")[0].device_kind) is None


@pytest.mark.parametrize("remat,matmuls", [("full", 2 + 2 + 3 + 4), ("attention", 2 + 3 + 4)])
def test_what_a_rematerialized_block_saved_is_not_counted_again(remat, matmuls):
    block = jax.checkpoint(lambda x, _: (jnp.sin(splash(x, x, x, None)), None), policy=REMAT[remat], prevent_cse=False)
    loss = jax.value_and_grad(lambda x: jnp.sum(lax.scan(block, x, length=3)[0]))
    once = 2 * 1024 * 1024 * 2 * 64
    assert flops.count(loss, shape(1, 1024, 2, 64)) == pytest.approx(3 * matmuls * once, rel=1e-3)
