"""T5, umT5 and ByT5: the same numbers as the reference implementations, the published sizes, distances, padding."""

import battery
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from vgjax.models.t5 import BUCKETS, REACH, SIZES, T5Encoder, buckets
from vgjax.open import tables
from vgjax.open.published.t5 import IGNORED, weights
from vgjax.parallel.sharding import unboxed

TINY = dict(vocab=31, dim=20, heads=2, inner=40, blocks=2, head_dim=6)
MODEL = T5Encoder(**TINY)


def inputs(lengths=(7, 3, 0), vocab=31):
    """Texts of these lengths, of which one may be empty."""
    ids = jax.random.randint(jax.random.key(0), (len(lengths), max(lengths)), 0, vocab)
    return ids, jnp.arange(max(lengths)) < jnp.array(lengths)[:, None]


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "own"])
def trained(request):
    model = MODEL.clone(shared_bias=request.param)
    return model, battery.perturbed(model, *inputs())


@pytest.fixture(scope="module")
def base(trained):
    return battery.loss_and_gradients(*trained, *inputs())


@pytest.fixture(scope="module")
def apply(trained):
    function = jax.jit(lambda *args: trained[0].apply({"params": trained[1]}, *args))
    return lambda *args: function(*args)


def reference(shared_bias, device="cpu", **config):
    import torch
    from transformers import T5EncoderModel, UMT5EncoderModel

    torch.set_num_threads(1)
    kind = T5EncoderModel if shared_bias else UMT5EncoderModel
    with torch.device(device):
        return kind(kind.config_class(**config, feed_forward_proj="gated-gelu"))


# As the config.json of each says.
PUBLISHED = {
    "t5-xxl": dict(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
    "umt5-xxl": dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64),
    "byt5-small": dict(vocab_size=384, d_model=1472, d_kv=64, d_ff=3584, num_layers=12, num_heads=6),
    "byt5-base": dict(vocab_size=384, d_model=1536, d_kv=64, d_ff=3968, num_layers=18, num_heads=12),
}


# Heads that fill more and less than the width, one head; odd texts, texts beyond the reach of distances.
CONFIGURATIONS = [
    (dict(), (7, 3)),
    (dict(head_dim=16, heads=3, blocks=3), (9, 9, 1)),
    (dict(heads=1, head_dim=4, dim=12), (5,)),
    (dict(head_dim=10, inner=17), (300, 151)),
]


@pytest.mark.parametrize("shared_bias", [True, False], ids=["t5", "umt5"])
@pytest.mark.parametrize("change, lengths", CONFIGURATIONS)
def test_equals_the_reference_with_the_same_weights(shared_bias, change, lengths):
    import torch

    model, (ids, mask) = MODEL.clone(**change, shared_bias=shared_bias), inputs(lengths)
    theirs = reference(
        shared_bias,
        vocab_size=model.vocab,
        d_model=model.dim,
        d_kv=model.head_dim,
        d_ff=model.inner,
        num_layers=model.blocks,
        num_heads=model.heads,
    )
    parity.randomised(theirs)
    params = parity.load(weights(model), model, theirs, ids, mask, ignored=IGNORED)
    ours = jax.jit(model.apply)({"params": params}, ids, mask)
    with torch.no_grad():
        given = torch.tensor(np.asarray(ids)), torch.tensor(np.asarray(mask)).long()
        parity.near(ours, theirs(*given).last_hidden_state.numpy())


def test_every_distance_is_in_the_bucket_of_the_reference():
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-2047, 2048)
    theirs = T5Attention._relative_position_bucket(distance, num_buckets=BUCKETS, max_distance=REACH)
    np.testing.assert_array_equal(buckets(2048), theirs.numpy())


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_read_every_tensor_of_the_reference_but_those_ignored(size):
    model = T5Encoder(**SIZES[size])
    params, hidden = battery.shapes(model, *jax.eval_shape(inputs))
    assert hidden.shape == (3, 7, model.dim)
    battery.every_leaf_has_names(params)
    theirs = reference(not size.startswith("umt5"), "meta", **PUBLISHED[size])
    assert battery.count(params) == sum(leaf.numel() for leaf in theirs.parameters())
    given = {name: (tuple(leaf.shape), "float32") for name, leaf in theirs.state_dict().items()}
    assert not tables.mismatches(weights(model), unboxed(params), given, IGNORED)


def test_padding_is_never_read(apply):
    ids, mask = inputs()
    padded, other = (apply(each, mask) for each in (ids, jnp.where(mask, ids, 5)))
    np.testing.assert_allclose(padded[1:2, :3], apply(ids[1:2, :3], mask[1:2, :3]), atol=1e-5)
    np.testing.assert_array_equal(padded[mask], other[mask])


def test_the_order_of_tokens_matters(apply):
    ids, mask = inputs((7, 7, 7))
    there, back = (apply(each, mask) for each in (ids, ids[:, ::-1]))
    assert jnp.max(jnp.abs(there - back[:, ::-1])) > 1e-3


def test_gradients_are_finite_and_none_is_zero_also_where_a_text_is_empty(base):
    battery.gradients_are_finite_and_none_is_zero(base[1])


def test_remat_and_unrolling_change_nothing(trained, base):
    model, params = trained
    other = model.clone(remat="full", scan=False)
    battery.agrees(battery.loss_and_gradients(other, params, *inputs()), base, atol=1e-4)


def test_bf16_is_near_fp32(trained):
    model, params = trained
    battery.bf16_is_near_fp32(model, params, *inputs())
