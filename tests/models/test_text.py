"""The text encoder: the battery, padding, Bloom embeddings, word order."""

import battery
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.errors import UserError
from vgjax.models.text import TextEncoder

MODEL = TextEncoder(vocab=50, hashes=2, dim=16, blocks=2, heads=2, pooled=12)
MASK = jnp.arange(6)[None] < jnp.array([[6], [3], [1]])
IDS = jax.random.randint(jax.random.key(0), (3, 6, 2), 1, 50) * MASK[:, :, None]


@pytest.fixture(scope="module")
def params():
    return battery.perturbed(MODEL, IDS, MASK)


@pytest.fixture(scope="module")
def apply(params):
    function = jax.jit(lambda ids, mask: MODEL.apply({"params": params}, ids, mask))
    return lambda *args: function(*args)


def test_shapes_and_names_with_two_hashes_and_with_one():
    for hashes in (1, 2):
        model = MODEL.clone(hashes=hashes)
        params, (c, vec) = battery.shapes(model, IDS[:, :, :hashes], MASK)
        assert (c.shape, vec.shape) == ((3, 6, 16), (3, 12))
        battery.every_leaf_has_names(params)


def test_gradients_remat_and_unrolling(params):
    loss, gradients = battery.loss_and_gradients(MODEL, params, IDS, MASK)
    battery.gradients_are_finite_and_none_is_zero(gradients)
    other = MODEL.clone(remat="full", scan=False)
    battery.agrees((loss, gradients), battery.loss_and_gradients(other, params, IDS, MASK))


def test_bf16_is_near_fp32(params):
    battery.bf16_is_near_fp32(MODEL, params, IDS, MASK)


def test_padding_changes_nothing(apply):
    c, vec = apply(IDS, MASK)
    short, short_vec = apply(IDS[1:2, :3], MASK[1:2, :3])
    np.testing.assert_allclose(c[1:2, :3], short, atol=1e-5)
    np.testing.assert_allclose(vec[1:2], short_vec, atol=1e-5)
    np.testing.assert_array_equal(c[~MASK], 0)


def test_what_stands_in_padding_is_never_read(apply):
    garbage = jnp.where(MASK[:, :, None], IDS, 7)
    battery.agrees(apply(garbage, MASK), apply(IDS, MASK), atol=0, rtol=0)


def test_words_that_share_one_bucket_still_differ(apply):
    other = IDS.at[0, 2, 1].set((IDS[0, 2, 1] + 1) % 50)
    (_, first), (_, second) = apply(IDS, MASK), apply(other, MASK)
    assert jnp.max(jnp.abs(first[0] - second[0])) > 1e-3


def test_word_order_matters(apply):
    (_, first), (_, second) = apply(IDS, MASK), apply(IDS[:, ::-1], MASK)
    assert jnp.max(jnp.abs(first[0] - second[0])) > 1e-3


def test_a_caption_of_padding_alone_is_finite(apply):
    c, vec = apply(IDS, jnp.zeros_like(MASK))
    assert jnp.all(jnp.isfinite(c)) and jnp.all(jnp.isfinite(vec))


def test_wrong_hashes_and_heads_are_named():
    with pytest.raises(UserError, match="expects 2 ids a token, the tokenizer gives 1"):
        battery.shapes(MODEL, IDS[:, :, :1], MASK)
    with pytest.raises(UserError, match="dim 16 .* heads 3"):
        battery.shapes(MODEL.clone(heads=3), IDS, MASK)
