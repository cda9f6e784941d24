"""CrossDiT: the battery, and the same numbers, gradients and sizes as the reference implementation of Wan."""

import battery
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from vgjax.errors import UserError
from vgjax.models.crossdit import SIZES, CrossDiT
from vgjax.nn import patch
from vgjax.open.published.crossdit import weights

TINY = dict(dim=48, heads=2, inner=40, blocks=2, channels=3, text_dim=10)
MODEL = CrossDiT(**TINY)


def inputs(model=MODEL, b=2, m=5, grid=(3, 4, 6), each=False):
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (b, *grid, model.channels + model.conditions))
    t = jax.random.uniform(keys[1], (b, grid[0]) if each else (b,))
    c = jax.random.normal(keys[2], (b, m, model.text_dim))
    mask = jnp.ones((b, m), bool)
    image = (None, None, jax.random.normal(keys[3], (b, 7, model.image_dim))) if model.image_dim else ()
    return x, t, c, mask, *image


@pytest.fixture(scope="module")
def params():
    return battery.perturbed(MODEL, *inputs())


@pytest.fixture(scope="module")
def base(params):
    return battery.loss_and_gradients(MODEL, params, *inputs())


@pytest.fixture(scope="module")
def apply(params):
    return jax.jit(lambda *args: MODEL.apply({"params": params}, *args))


def reference(device, model):
    import torch
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    with torch.device(device):
        return WanTransformer3DModel(
            patch_size=model.patch,
            num_attention_heads=model.heads,
            attention_head_dim=model.dim // model.heads,
            in_channels=model.channels + model.conditions,
            out_channels=model.channels,
            text_dim=model.text_dim,
            ffn_dim=model.inner,
            num_layers=model.blocks,
            image_dim=model.image_dim or None,
            added_kv_proj_dim=model.dim if model.image_dim else None,
        )


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_has_exactly_the_parameters_of_the_reference(size):
    model = CrossDiT(**SIZES[size])
    abstract = jax.eval_shape(lambda: inputs(model))
    params, v = battery.shapes(model, *abstract)
    assert v.shape == (*abstract[0].shape[:-1], model.channels)
    battery.every_leaf_has_names(params)
    assert battery.count(params) == sum(p.numel() for p in reference("meta", model).parameters())


def torch_of(x, t, c, mask, vec=None, guidance=None, image=None):
    """Arguments of the reference; its text is 512 tokens where there is an image, and its times are per token."""
    import torch

    x, t = parity.to_torch(x), np.asarray(1000 * t)
    if t.ndim == 2:
        t = np.repeat(t, x.shape[3] * x.shape[4] // 4, axis=1)
    given = dict(timestep=t, encoder_hidden_states=c)
    if image is not None:
        given["encoder_hidden_states_image"] = image
    return {"hidden_states": x} | {name: torch.tensor(np.asarray(a)) for name, a in given.items()}


PARITY = {
    "text to video": (dict(), dict()),
    "one head, odd and not square": (dict(heads=1, dim=26), dict(grid=(1, 6, 10), m=3)),
    "image tokens and conditions": (dict(conditions=4, image_dim=14), dict(m=512)),
    "a time for each frame": (dict(heads=3, dim=72), dict(each=True, b=1)),
    "conditions alone, long patches": (dict(conditions=5, patch=(2, 2, 2), blocks=3), dict(grid=(4, 2, 8))),
}


@pytest.mark.parametrize("case", PARITY)
def test_equals_diffusers_wan_with_the_same_weights(case):
    import torch

    of_model, of_inputs = PARITY[case]
    model = MODEL.clone(**of_model)
    theirs = parity.randomised(reference("cpu", model))
    given = inputs(model, **of_inputs)
    with torch.no_grad():
        expected = theirs(**torch_of(*given)).sample
    v = jax.jit(model.apply)({"params": parity.load(weights(model), model, theirs, *given)}, *given)
    parity.near(v, parity.of_torch(expected))


def test_gradients_equal_those_of_torch():
    model = MODEL.clone(conditions=4, image_dim=14)
    given = inputs(model, m=512, grid=(1, 4, 4))
    theirs = parity.randomised(reference("cpu", model))
    (theirs(**torch_of(*given)).sample ** 2).mean().backward()
    params = parity.load(weights(model), model, theirs, *given)
    ours = jax.jit(jax.grad(lambda p: jnp.mean(model.apply({"params": p}, *given) ** 2)))(params)
    parity.same_gradients(weights(model), ours, theirs)


def test_gradients_are_finite_and_none_is_zero(base):
    battery.gradients_are_finite_and_none_is_zero(base[1])


def test_remat_and_unrolling_change_nothing(params, base):
    other = MODEL.clone(remat="full", scan=False)
    battery.agrees(battery.loss_and_gradients(other, params, *inputs()), base, atol=1e-4)


def test_bf16_is_near_fp32(params):
    battery.bf16_is_near_fp32(MODEL, params, *inputs())


def test_the_residual_stream_is_fp32_which_keeps_deep_models_exact():
    battery.a_stream_in_fp32_keeps_deep_models_exact(MODEL.clone(blocks=36), *inputs())
    assert MODEL.stream == jnp.float32


def test_a_masked_token_is_never_read_and_a_time_for_all_frames_is_one_for_each(apply):
    x, t, c, _ = inputs()
    mask = jnp.arange(5)[None] < jnp.array([[3], [5]])
    short = apply(x[:1], t[:1], c[:1, :3], mask[:1, :3])
    np.testing.assert_allclose(apply(x, t, jnp.where(mask[..., None], c, 1e3), mask)[:1], short, atol=1e-5)
    each = jnp.broadcast_to(t[:, None], (2, 3))
    np.testing.assert_allclose(apply(x, each, c, mask), apply(x, t, c, mask), atol=1e-5)


def test_packed_rows_equal_their_samples_alone(params, apply):
    """Two videos of different sizes in one row, each with a time and a text of its own, with padding between."""
    samples = [inputs(b=1, m=3, grid=(1, 4, 6)), inputs(b=1, m=5, grid=(2, 4, 2))]
    tokens, places = np.full((1, 13, 12), 1e3, np.float32), np.zeros((1, 13, 3), np.int32)
    ids, of_c = np.zeros((1, 13), np.int32), np.repeat([[1, 2]], [3, 5], axis=1)
    spans, at = [], 0
    for i, (x, *_) in enumerate(samples, start=1):
        grid = patch.check(x.shape[1:4], MODEL.patch)
        own = patch.patchify(x, MODEL.patch)[0]
        end = at + len(own)
        tokens[0, at:end], places[0, at:end], ids[0, at:end] = own, patch.positions(grid), i
        spans.append((at, end, grid))
        at = end + 1
    t = jnp.stack([s[1][0] + 0.2 * i for i, s in enumerate(samples)])[None]
    c = jnp.concatenate([s[2] for s in samples], axis=1)
    given = map(jnp.asarray, (tokens, places, ids, t, ids, c, of_c))
    packed = jax.jit(lambda *args: MODEL.apply({"params": params}, *args, method="packed"))(*given)
    for i, ((x, _, c, mask), (at, end, grid)) in enumerate(zip(samples, spans, strict=True)):
        alone = apply(x, t[:, i], c, mask)
        np.testing.assert_allclose(patch.unpatchify(packed[:, at:end], MODEL.patch, grid), alone, atol=1e-5)


def test_sizes_that_do_not_fit_are_named():
    x, t, c, mask = inputs()
    for change, message in [
        (dict(heads=5), "dim 48 does not divide into heads 5"),
        (dict(rope_dims=(4, 4, 6)), r"\(4, 4, 6\) .* head size 24"),
        (dict(conditions=2), r"channels \+ conditions is 5 .* last dim of 3"),
        (dict(text_dim=11), "text_dim is 11 .* last dim of 10"),
        (dict(image_dim=8), "image_dim is 8: the call must give an image"),
    ]:
        with pytest.raises(UserError, match=message):
            battery.shapes(MODEL.clone(**change), x, t, c, mask)
    with pytest.raises(UserError, match="2 times for 3 latent frames"):
        battery.shapes(MODEL, x, jnp.zeros((2, 2)), c, mask)
