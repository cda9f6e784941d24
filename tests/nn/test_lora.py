"""Low-rank adaptation: born without effect, merged it is the same function, and it learns alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.errors import UserError
from vgjax.models.crossdit import CrossDiT
from vgjax.models.mmdit import MMDiT
from vgjax.nn import lora
from vgjax.open import tables
from vgjax.parallel import sharding

MODELS = {
    "mmdit": MMDiT(
        dim=32, heads=2, double_blocks=2, single_blocks=1, refiner_blocks=1, channels=4, text_dim=12, pooled_dim=6
    ),
    "crossdit": CrossDiT(dim=32, heads=2, inner=40, blocks=2, channels=4, text_dim=12),
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """(apply, parameters, lora of rank 3, arguments, boxed parameters), every leaf random."""
    model = MODELS[request.param]
    given = normal(0, 2, 2, 4, 6, 4), jnp.array([0.2, 0.7]), normal(1, 2, 5, 12), jnp.arange(5) < jnp.array([[3], [5]])
    given += (normal(2, 2, 6),) if request.param == "mmdit" else ()
    boxed = jax.jit(model.init)(jax.random.key(0), *given)["params"]
    own = sharding.unboxed(lora.born(boxed, 3, lora.TARGETS, jax.random.key(1)))
    params = jax.tree.map(lambda x: x + 0.1 * normal(x.size, *x.shape), sharding.unboxed(boxed))
    return jax.jit(model.apply), params, own, given, boxed


def moved(own):
    return jax.tree.map(lambda x: x + 0.2 * normal(x.size, *x.shape), own)


def test_at_birth_the_model_is_as_it_was(case):
    apply, params, own, given, _ = case
    np.testing.assert_array_equal(apply({"params": params, "lora": own}, *given), apply({"params": params}, *given))


def test_merged_it_is_the_same_function(case):
    apply, params, own, given, _ = case
    own = moved(own)
    applied = apply({"params": params, "lora": lora.scaled(own, 2.0)}, *given)
    merged = apply({"params": lora.merged(params, lora.scaled(own, 2.0))}, *given)
    assert np.abs(applied - apply({"params": params}, *given)).max() > 0.1 * np.std(applied)
    np.testing.assert_allclose(merged, applied, rtol=0, atol=2e-5 * np.std(applied))


def test_every_kernel_of_the_blocks_has_its_product_and_learns(case):
    apply, params, own, given, boxed = case

    def loss(own):
        return jnp.mean(jnp.square(apply({"params": params, "lora": own}, *given)))

    grads = tables.flat(jax.jit(jax.grad(loss))(moved(own)))
    stacked = {
        path.removesuffix("/kernel/value")
        for path, leaf in tables.flat(boxed).items()
        if path.endswith("/kernel/value") and "/block/" in path and "modulation" not in path
    }
    assert {path.rsplit("/", 1)[0] for path in grads} == stacked
    assert all(np.isfinite(grad).all() and np.abs(grad).max() > 0 for grad in grads.values())


def test_names_say_where_the_small_kernels_lie(case):
    *_, boxed = case
    own = tables.flat(
        jax.tree.map(
            lambda box: str(box.names),
            lora.born(boxed, 3, ("merge",), jax.random.key(0)),
            is_leaf=lambda leaf: isinstance(leaf, sharding.Named),
        )
    )
    for path, names in own.items():
        want = "('layers', 'heads', 'head_dim', None)" if path.endswith("/a") else "('layers', None, 'embed')"
        assert names == want


def test_targets_that_name_nothing_are_a_user_error(case):
    *_, boxed = case
    with pytest.raises(UserError, match="name no kernel"):
        lora.born(boxed, 3, ("query",), jax.random.key(0))
