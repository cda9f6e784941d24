"""CLIP: the same numbers as the reference implementations, the published sizes, padding, the pooled token."""

import battery
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from einops import rearrange

from vgjax.errors import UserError
from vgjax.models.clip import SIZES, CLIPText, CLIPVision
from vgjax.open import tables
from vgjax.open.published.clip import IGNORED, weights
from vgjax.parallel.sharding import unboxed

TEXT = CLIPText(vocab=31, dim=24, heads=2, inner=40, blocks=2, positions=11, act="quick_gelu")
VISION = CLIPVision(dim=24, heads=2, inner=40, blocks=2, patch=4, image=12)


def text(lengths=(7, 3, 0), end=30, pad=0):
    """Texts of these lengths, of which one may be empty: ids below `end`, which stands last in each."""
    ids = jax.random.randint(jax.random.key(0), (len(lengths), max(lengths)), 3, end)
    at, last = jnp.arange(max(lengths)), jnp.array(lengths)[:, None] - 1
    return jnp.where(at < last, ids, jnp.where(at == last, end, pad)), at <= last


def image(b=2, height=12, width=12):
    return (jax.random.normal(jax.random.key(0), (b, height, width, 3)),)


MODELS = {"text": (TEXT, text), "projected": (TEXT.clone(projection=5), text), "vision": (VISION, image)}


@pytest.fixture(scope="module", params=MODELS)
def trained(request):
    model, inputs = MODELS[request.param]
    return model, battery.perturbed(model, *inputs()), *inputs()


@pytest.fixture(scope="module")
def base(trained):
    return battery.loss_and_gradients(*trained)


@pytest.fixture(scope="module")
def apply():
    params = battery.perturbed(TEXT, *text())
    function = jax.jit(lambda *args: TEXT.apply({"params": params}, *args))
    return lambda *args: function(*args)


def reference(name, device="cpu", **config):
    import torch
    import transformers

    torch.set_num_threads(1)
    kind = getattr(transformers, name)
    with torch.device(device):
        return kind(kind.config_class(**config))


def tiny(model, **config):
    config |= dict(hidden_size=model.dim, num_attention_heads=model.heads, intermediate_size=model.inner)
    config |= dict(hidden_act=model.act)
    if isinstance(model, CLIPVision):
        return reference("CLIPVisionModel", **config, patch_size=model.patch, image_size=model.image)
    config |= dict(vocab_size=model.vocab, max_position_embeddings=model.positions, num_hidden_layers=model.blocks)
    if model.projection:
        return reference("CLIPTextModelWithProjection", **config, projection_dim=model.projection)
    return reference("CLIPTextModel", **config)


# As the config.json of each says.
PUBLISHED = {
    "l": dict(
        name="CLIPTextModel",
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        num_hidden_layers=12,
    ),
    "g": dict(
        name="CLIPTextModelWithProjection",
        vocab_size=49408,
        hidden_size=1280,
        intermediate_size=5120,
        num_attention_heads=20,
        num_hidden_layers=32,
        projection_dim=1280,
    ),
    "h14": dict(
        name="CLIPVisionModel",
        hidden_size=1280,
        intermediate_size=5120,
        num_attention_heads=16,
        num_hidden_layers=32,
        patch_size=14,
        image_size=224,
    ),
}


def prefix(model):
    """Of the reference's names, which only a model around the encoder gives one."""
    return "text_model." if getattr(model, "projection", None) else ""


# Both activations, both rules for the end, of which the second finds the first of several; one head; the longest text.
TEXTS = [
    (dict(), dict(eos_token_id=2), text((7, 3))),
    (dict(act="gelu", eos=9), dict(eos_token_id=9), text((9, 9, 2), end=9, pad=9)),
    (dict(heads=1, dim=10, inner=7), dict(eos_token_id=2), text((5,))),
    (dict(act="gelu", eos=7, blocks=3), dict(eos_token_id=7), text((11, 4, 1), end=7, pad=29)),
    (dict(projection=5), dict(eos_token_id=2), text((10, 7))),
    (dict(projection=24, act="gelu", eos=30, heads=6), dict(eos_token_id=30), text((3, 8), pad=30)),
]


@pytest.mark.parametrize("change, config, inputs", TEXTS)
def test_text_equals_the_reference_with_the_same_weights(change, config, inputs):
    import torch

    model, (ids, mask) = TEXT.clone(**change), inputs
    theirs = parity.randomised(tiny(model, **config))
    params = parity.load(weights(model, prefix(model)), model, theirs, ids, mask)
    hidden, pooled = jax.jit(model.apply)({"params": params}, ids, mask)
    with torch.no_grad():
        found = theirs(torch.tensor(np.asarray(ids)), attention_mask=torch.tensor(np.asarray(mask)).long())
    parity.near(hidden[mask], found.last_hidden_state.numpy()[np.asarray(mask)])
    parity.near(pooled, (found.text_embeds if model.projection else found.pooler_output).numpy())


# Square as trained, one head, not square (positions interpolated both ways), one patch a side.
IMAGES = [
    (dict(), image()),
    (dict(heads=1, dim=10, act="quick_gelu"), image(3)),
    (dict(), image(1, 20, 8)),
    (dict(patch=3, image=15, blocks=1), image(2, 6, 33)),
    (dict(image=4), image(2, 4, 4)),
    (dict(image=24), image(1, 16, 36)),
]


@pytest.mark.parametrize("change, pixels", IMAGES)
def test_image_tokens_equal_the_reference_before_its_last_block(change, pixels):
    import torch

    model = VISION.clone(**change, norm=False)
    theirs = parity.randomised(tiny(model, num_hidden_layers=model.blocks + 1))
    ignored = (*IGNORED, f"encoder.layers.{model.blocks}.", "post_layernorm.")
    params = parity.load(weights(model, ""), model, theirs, *pixels, ignored=ignored)
    ours = jax.jit(model.apply)({"params": params}, *pixels)
    given = torch.tensor(np.array(rearrange(pixels[0], "b h w c -> b c h w")))
    with torch.no_grad():
        found = theirs(given, output_hidden_states=True, interpolate_pos_encoding=True)
    parity.near(ours, found.hidden_states[-2].numpy())


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_read_every_tensor_of_the_reference(size):
    is_text = "vocab" in SIZES[size]
    model = (CLIPText if is_text else CLIPVision)(**SIZES[size])
    inputs = text((77, 9)) if is_text else image(2, 224, 224)
    params, out = battery.shapes(model, *jax.eval_shape(lambda: inputs))
    if is_text:
        assert [leaf.shape for leaf in out] == [(2, 77, model.dim), (2, model.dim)]
    else:
        assert out.shape == (2, 257, 1280)
    battery.every_leaf_has_names(params)
    theirs = reference(device="meta", **PUBLISHED[size]).state_dict()
    assert battery.count(params) == sum(leaf.numel() for leaf in theirs.values())
    # Published files have a prefix that transformers 5 takes away.
    root = "" if prefix(model) else "text_model." if is_text else "vision_model."
    given = {root + name: (tuple(leaf.shape), "float32") for name, leaf in theirs.items()}
    given[f"{root or prefix(model)}embeddings.position_ids"] = (1, 77), "int64"
    assert not tables.mismatches(weights(model), unboxed(params), given, IGNORED)


def test_padding_does_not_change_real_tokens(apply):
    ids, mask = text()
    hidden, pooled = apply(ids, mask)
    battery.agrees((hidden[1:2, :3], pooled[1:2]), apply(ids[1:2, :3], mask[1:2, :3]))


def test_a_token_sees_no_later_one(apply):
    ids, mask = text((7, 7, 7))
    now, then = (apply(each, mask)[0] for each in (ids, ids.at[:, 4].set(1)))
    np.testing.assert_array_equal(now[:, :4], then[:, :4])
    assert jnp.min(jnp.max(jnp.abs(now - then), axis=-1)[:, 4:]) > 1e-3


def test_what_is_masked_is_never_read(apply):
    ids, mask = text((7, 7, 7))
    mask = mask.at[:, 2].set(False)
    now, then = (apply(each, mask)[0] for each in (ids, ids.at[:, 2].set(1)))
    np.testing.assert_array_equal(now[mask], then[mask])


def test_gradients_are_finite_and_none_is_zero_also_where_a_text_is_empty(base):
    battery.gradients_are_finite_and_none_is_zero(base[1])


def test_remat_and_unrolling_change_nothing(trained, base):
    model, *rest = trained
    battery.agrees(battery.loss_and_gradients(model.clone(remat="full", scan=False), *rest), base, atol=1e-4)


def test_bf16_is_near_fp32(trained):
    battery.bf16_is_near_fp32(*trained)


def test_sizes_that_do_not_fit_are_named():
    for model, inputs, message in [
        (TEXT, text((12,)), "12 tokens is longer than CLIP's 11 positions"),
        (TEXT.clone(heads=5), text(), "dim 24 of CLIP does not divide into heads 5"),
        (VISION, image(1, 12, 14), "12x14 does not divide into CLIP's patches of 4"),
    ]:
        with pytest.raises(UserError, match=message):
            battery.shapes(model, *inputs)
