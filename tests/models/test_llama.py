"""Llama: the same numbers as the reference implementation after any block, the published sizes, padding."""

import battery
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from vgjax.errors import UserError
from vgjax.models.llama import SIZES, Llama
from vgjax.open import tables
from vgjax.open.published.llama import IGNORED, weights
from vgjax.parallel.sharding import unboxed

TINY = dict(vocab=31, dim=24, heads=4, kv_heads=2, inner=40, blocks=2)
MODEL = Llama(**TINY)


def inputs(lengths=(7, 3, 0), vocab=31):
    """Texts of these lengths, of which one may be empty."""
    ids = jax.random.randint(jax.random.key(0), (len(lengths), max(lengths)), 0, vocab)
    return ids, jnp.arange(max(lengths)) < jnp.array(lengths)[:, None]


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


def reference(device="cpu", **config):
    import torch
    from transformers import LlamaConfig, LlamaModel

    torch.set_num_threads(1)
    with torch.device(device):
        return LlamaModel(LlamaConfig(**config))


def tiny(model, blocks):
    return reference(
        vocab_size=model.vocab,
        hidden_size=model.dim,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        intermediate_size=model.inner,
        num_hidden_layers=blocks,
        rms_norm_eps=model.eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.theta},
    )


# As the config.json of each says.
_8B = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    num_hidden_layers=32,
)
PUBLISHED = {"llama-3-8b": _8B, "hunyuan-video": dict(_8B, vocab_size=128320)}


def expected(theirs, ids, mask):
    import torch

    ids, mask = torch.tensor(np.asarray(ids)), torch.tensor(np.asarray(mask))
    with torch.no_grad():
        return theirs(ids, attention_mask=mask.long(), output_hidden_states=True)


# One group of keys for two heads, for all, for each; one head; heads as wide as the model, odd and longer texts.
CONFIGURATIONS = [
    (dict(), (7, 3)),
    (dict(kv_heads=1, theta=1e4), (9, 9, 1)),
    (dict(kv_heads=4, eps=1e-3), (5,)),
    (dict(dim=10, heads=1, kv_heads=1, inner=7), (40, 33)),
    (dict(dim=48, heads=6, kv_heads=3, theta=10.0, blocks=3), (130, 2)),
]


@pytest.mark.parametrize("change, lengths", CONFIGURATIONS)
def test_equals_the_reference_with_the_same_weights(change, lengths):
    model, (ids, mask) = MODEL.clone(**change), inputs(lengths)
    theirs = parity.randomised(tiny(model, model.blocks))
    params = parity.load(weights(model), model, theirs, ids, mask)
    ours = jax.jit(model.apply)({"params": params}, ids, mask)
    parity.near(ours[mask], expected(theirs, ids, mask).last_hidden_state.numpy()[np.asarray(mask)])


@pytest.mark.parametrize("change, lengths", CONFIGURATIONS)
def test_equals_the_third_last_hidden_state_of_the_reference(change, lengths):
    model, (ids, mask) = MODEL.clone(**change, norm=False), inputs(lengths)
    theirs = parity.randomised(tiny(model, model.blocks + 2))
    behind = tuple(f"layers.{model.blocks + i}." for i in range(2))
    params = parity.load(weights(model), model, theirs, ids, mask, ignored=(*IGNORED, *behind, "norm."))
    ours = jax.jit(model.apply)({"params": params}, ids, mask)
    parity.near(ours[mask], expected(theirs, ids, mask).hidden_states[-3].numpy()[np.asarray(mask)])


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_read_every_tensor_of_the_reference(size):
    model = Llama(**SIZES[size])
    shape = jax.ShapeDtypeStruct((2, 5), jnp.int32), jax.ShapeDtypeStruct((2, 5), bool)
    params, hidden = battery.shapes(model, *shape)
    assert hidden.shape == (2, 5, 4096)
    battery.every_leaf_has_names(params)
    theirs = reference("meta", **PUBLISHED[size]).state_dict()
    assert battery.count(params) == sum(leaf.numel() for leaf in theirs.values())
    for prefix in ("", "model."):  # of LlamaModel and of LlamaForCausalLM
        given = {prefix + name: (tuple(leaf.shape), "float16") for name, leaf in theirs.items()}
        assert not tables.mismatches(weights(model, prefix), unboxed(params), given, IGNORED)


def test_padding_does_not_change_real_tokens(apply):
    ids, mask = inputs()
    alone = apply(ids[1:2, :3], mask[1:2, :3])
    np.testing.assert_allclose(apply(ids, mask)[1:2, :3], alone, atol=1e-5)


def test_a_token_sees_no_later_one(apply):
    ids, mask = inputs((7, 7, 7))
    now, then = (apply(each, mask) for each in (ids, ids.at[:, 4].add(1) % 31))
    np.testing.assert_array_equal(now[:, :4], then[:, :4])
    assert jnp.min(jnp.max(jnp.abs(now - then), axis=-1)[:, 4:]) > 1e-3


def test_what_is_masked_is_never_read(apply):
    ids, mask = inputs((7, 7, 7))
    mask = mask.at[:, 2].set(False)
    now, then = (apply(each, mask) for each in (ids, ids.at[:, 2].add(1) % 31))
    np.testing.assert_array_equal(now[mask], then[mask])


def test_gradients_are_finite_and_none_is_zero_also_where_a_text_is_empty(base):
    battery.gradients_are_finite_and_none_is_zero(base[1])


def test_remat_and_unrolling_change_nothing(params, base):
    other = MODEL.clone(remat="full", scan=False)
    battery.agrees(battery.loss_and_gradients(other, params, *inputs()), base, atol=1e-4)


def test_bf16_is_near_fp32(params):
    battery.bf16_is_near_fp32(MODEL, params, *inputs())


def test_sizes_that_do_not_fit_are_named():
    for change in (dict(heads=5, kv_heads=5), dict(kv_heads=3)):
        with pytest.raises(UserError, match=r"dim 24 of Llama must divide into heads . and these|into kv_heads"):
            battery.shapes(MODEL.clone(**change), *inputs())
