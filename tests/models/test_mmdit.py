"""MM-DiT: the battery, padding, the published sizes, and the same numbers as the reference implementation."""

import math

import battery
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from vgjax.errors import UserError
from vgjax.models.mmdit import SIZES, MMDiT
from vgjax.nn import patch
from vgjax.nn.rope import split
from vgjax.open.published.mmdit import weights

TINY = dict(dim=24, heads=2, double_blocks=2, single_blocks=2, channels=3, text_dim=10, pooled_dim=6, refiner_blocks=2)
MODEL = MMDiT(**TINY, guidance=True)
PARAMETERS = {"s": 35e6, "b": 138e6, "l": 452e6, "2b": 1.95e9}


def inputs(model=MODEL, b=2, m=5, grid=(3, 4, 4)):
    keys = jax.random.split(jax.random.key(0), 5)
    x = jax.random.normal(keys[0], (b, *grid, model.channels))
    t = jax.random.uniform(keys[1], (b,))
    c = jax.random.normal(keys[2], (b, m, model.text_dim))
    mask = jnp.arange(m)[None] < jnp.array([[m], [2]])[:b]
    vec = jax.random.normal(keys[3], (b, model.pooled_dim))
    return x, t, c, mask, vec, *((6 * jnp.ones(b),) if model.guidance else ())


@pytest.fixture(scope="module")
def params():
    return battery.perturbed(MODEL, *inputs())


@pytest.fixture(scope="module")
def base(params):
    return battery.loss_and_gradients(MODEL, params, *inputs())


@pytest.fixture(scope="module")
def apply(params):
    function = jax.jit(lambda *args: MODEL.apply({"params": params}, *args))
    return lambda *args: function(*args)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_its_shapes_and_names(size):
    model = MMDiT(**(dict(channels=4, text_dim=512, pooled_dim=512) | SIZES[size]))
    abstract = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jax.eval_shape(lambda: inputs(model))]
    params, v = battery.shapes(model, *abstract)
    assert v.shape == abstract[0].shape and v.dtype == jnp.float32
    battery.every_leaf_has_names(params)
    if size in PARAMETERS:
        assert abs(battery.count(params) / PARAMETERS[size] - 1) < 0.05


def test_an_untrained_model_says_no_velocity():
    model = MODEL.clone(double_blocks=0, single_blocks=0, refiner_blocks=0)
    v, _ = jax.jit(model.init_with_output)(jax.random.key(0), *inputs())
    np.testing.assert_array_equal(v, 0)


def test_gradients_are_finite_and_none_is_zero(base):
    battery.gradients_are_finite_and_none_is_zero(base[1])


def test_remat_and_unrolling_change_nothing(params, base):
    other = MODEL.clone(remat="full", scan=False)
    battery.agrees(battery.loss_and_gradients(other, params, *inputs()), base, atol=1e-4)


def test_bf16_is_near_fp32(params):
    battery.bf16_is_near_fp32(MODEL, params, *inputs())


def test_a_residual_stream_in_fp32_keeps_deep_models_exact():
    battery.a_stream_in_fp32_keeps_deep_models_exact(MODEL.clone(double_blocks=12, single_blocks=24), *inputs())


def test_a_padded_prompt_equals_an_unpadded_one(apply):
    x, t, c, mask, vec, guidance = inputs()
    short = apply(x[1:], t[1:], c[1:, :2], mask[1:, :2], vec[1:], guidance[1:])
    np.testing.assert_allclose(apply(x, t, c, mask, vec, guidance)[1:], short, atol=1e-5)


def test_what_stands_in_padding_is_never_read(apply):
    x, t, c, mask, vec, guidance = inputs()
    garbage = jnp.where(mask[:, :, None], c, 1e3)
    np.testing.assert_array_equal(apply(x, t, garbage, mask, vec, guidance), apply(x, t, c, mask, vec, guidance))


def test_packed_rows_equal_their_samples_alone(params, apply):
    """Three videos of different sizes in two rows, with padding in between and behind."""
    samples = [inputs(b=1, m=3, grid=(1, 4, 6)), inputs(b=1, m=5, grid=(2, 4, 2)), inputs(b=1, m=2, grid=(3, 2, 2))]
    samples = [[leaf + 0.1 * i if leaf.dtype == jnp.float32 else leaf for leaf in s] for i, s in enumerate(samples)]
    rows, n, m = [(0, 1), (2,)], 12, 9
    tokens = np.full((2, n, 4 * MODEL.channels), 1e3, np.float32)
    places, of_x = np.zeros((2, n, 3), np.int32), np.zeros((2, n), np.int32)
    c, of_c = np.full((2, m, MODEL.text_dim), 1e3, np.float32), np.zeros((2, m), np.int32)
    t, vec, guidance = np.ones((2, 2), np.float32), np.ones((2, 2, MODEL.pooled_dim), np.float32), np.ones((2, 2))
    found = {}
    for row, members in enumerate(rows):
        at, word = 0, 1
        for place, i in enumerate(members):
            x, t[row, place], text, _, vec[row, place], guidance[row, place] = (leaf[0] for leaf in samples[i])
            grid = patch.check(x.shape[:3], MODEL.patch)
            end = at + math.prod(grid)
            tokens[row, at:end] = patch.patchify(x[None], MODEL.patch)[0]
            places[row, at:end], of_x[row, at:end] = patch.positions(grid), place + 1
            c[row, word : word + len(text)], of_c[row, word : word + len(text)] = text, place + 1
            found[i] = (row, at, end, grid)
            at, word = end + 1, word + len(text)
    given = map(jnp.asarray, (tokens, places, of_x, t, c, of_c, vec, guidance))
    packed = jax.jit(lambda *args: MODEL.apply({"params": params}, *args, method="packed"))(*given)
    for i, (row, at, end, grid) in found.items():
        x, t, text, _, vec, guidance = samples[i]
        alone = apply(x, t, text, jnp.ones(text.shape[:2], bool), vec, guidance)
        np.testing.assert_allclose(patch.unpatchify(packed[row : row + 1, at:end], MODEL.patch, grid), alone, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1, 2, 4, 5], ids=["x", "t", "c", "vec", "guidance"])
def test_every_input_matters(index, apply):
    changed = list(inputs())
    changed[index] = 0.5 * changed[index]
    assert jnp.max(jnp.abs(apply(*changed) - apply(*inputs()))) > 1e-3


def test_the_order_of_patches_matters(apply):
    x, *rest = inputs()
    assert jnp.max(jnp.abs(apply(jnp.roll(x, 2, axis=3), *rest) - jnp.roll(apply(x, *rest), 2, axis=3))) > 1e-3


def test_sizes_that_do_not_fit_are_named():
    x, t, c, mask, vec, guidance = inputs()
    for change, message in [
        (dict(heads=5), "dim 24 does not divide into heads 5"),
        (dict(rope_dims=(4, 4, 6)), r"\(4, 4, 6\) .* head size 12"),
        (dict(channels=4), r"channels \+ conditions is 4 .* last dim of 3"),
        (dict(text_dim=11), "text_dim is 11 .* last dim of 10"),
        (dict(guidance=False), "guidance is False"),
        (dict(patch=(2, 2, 2)), "3x4x4 does not divide into patches of 2x2x2; the nearest that does is"),
    ]:
        with pytest.raises(UserError, match=message):
            battery.shapes(MODEL.clone(**change), x, t, c, mask, vec, guidance)


def reference(device, model):
    import torch
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoTransformer3DModel

    with torch.device(device):
        return HunyuanVideoTransformer3DModel(
            in_channels=model.channels,
            out_channels=model.channels,
            num_attention_heads=model.heads,
            attention_head_dim=model.dim // model.heads,
            num_layers=model.double_blocks,
            num_single_layers=model.single_blocks,
            num_refiner_layers=model.refiner_blocks,
            mlp_ratio=model.mlp_ratio,
            patch_size=model.patch[1],
            patch_size_t=model.patch[0],
            guidance_embeds=model.guidance,
            text_embed_dim=model.text_dim,
            pooled_projection_dim=model.pooled_dim,
            rope_theta=model.theta,
            rope_axes_dim=model.rope_dims or split(model.dim // model.heads),
        )


def test_13b_has_exactly_the_parameters_of_hunyuan_video():
    model = MMDiT(**SIZES["13b"])
    params, _ = battery.shapes(model, *jax.eval_shape(lambda: inputs(model)))
    assert battery.count(params) == sum(p.numel() for p in reference("meta", model).parameters()) == 12_821_012_544


def torch_of(x, t, c, mask, vec, guidance=None):
    import torch

    given = (1000 * t, c, mask, vec, *(() if guidance is None else (1000 * guidance,)))
    return [parity.to_torch(x), *(torch.tensor(np.asarray(a)) for a in given)]


PARITY = {
    "guidance, a padded text": (dict(rope_dims=(4, 4, 4)), dict()),
    "one head, one frame, not square": (dict(heads=1, dim=20, guidance=False), dict(grid=(1, 6, 10), m=3)),
    "three heads, another period": (dict(heads=3, dim=48, theta=1e4), dict(grid=(5, 2, 4))),
    "an MLP half as wide, but not the refiner's": (dict(mlp_ratio=2.0), dict()),
    "patches of two frames, one refiner block": (
        dict(patch=(2, 2, 2), refiner_blocks=1, single_blocks=3, double_blocks=1),
        dict(grid=(4, 4, 2), m=9),
    ),
}


@pytest.mark.parametrize("case", PARITY)
def test_equals_diffusers_hunyuan_video_with_the_same_weights(case):
    import torch

    of_model, of_inputs = PARITY[case]
    model = MODEL.clone(**of_model)
    given, theirs = inputs(model, **of_inputs), parity.randomised(reference("cpu", model))
    with torch.no_grad():
        expected = theirs(*torch_of(*given)).sample
    v = jax.jit(model.apply)({"params": parity.load(weights(model), model, theirs, *given)}, *given)
    parity.near(v, parity.of_torch(expected))


def test_gradients_equal_those_of_torch():
    model = MODEL.clone(double_blocks=1, single_blocks=1, refiner_blocks=1)
    given, theirs = inputs(model), parity.randomised(reference("cpu", model))
    (theirs(*torch_of(*given)).sample ** 2).mean().backward()
    params = parity.load(weights(model), model, theirs, *given)
    ours = jax.jit(jax.grad(lambda p: jnp.mean(model.apply({"params": p}, *given) ** 2)))(params)
    parity.same_gradients(weights(model), ours, theirs)
