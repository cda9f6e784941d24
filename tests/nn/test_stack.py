"""The scan over blocks equals a plain loop over the same parameters, whatever is recomputed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vgjax.errors import UserError
from vgjax.nn.linear import Linear
from vgjax.nn.stack import REMAT, Stack
from vgjax.parallel.sharding import unboxed

LENGTH = 3


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, y):
        return x + jnp.tanh(Linear(self.width, name="linear")(x * y))


def inputs():
    return jax.random.normal(jax.random.key(0), (2, 4)), jax.random.normal(jax.random.key(1), (2, 4))


def params():
    return unboxed(Stack(partial(Block, 4), LENGTH).init(jax.random.key(2), *inputs())["params"])


def loop(params, x, y):
    for i in range(LENGTH):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["block"])
        x = Block(4).apply({"params": layer}, x, y)
    return x


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("scan", [True, False])
def test_stack_equals_a_loop_in_value_and_gradient(scan, remat):
    stack = Stack(partial(Block, 4), LENGTH, remat, scan)

    def loss(apply, params):
        return jnp.sum(jnp.square(apply(params, *inputs())))

    value, grads = jax.value_and_grad(partial(loss, lambda p, *a: stack.apply({"params": p}, *a)))(params())
    expected, expected_grads = jax.value_and_grad(partial(loss, loop))(params())
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), grads, expected_grads)


def test_layers_start_different_and_carry_a_leading_layers_name():
    boxed = Stack(partial(Block, 4), LENGTH).init(jax.random.key(2), *inputs())["params"]["block"]["linear"]["kernel"]
    assert boxed.names == ("layers", "embed", "mlp") and boxed.value.shape == (LENGTH, 4, 4)
    assert jnp.all(boxed.value[0] != boxed.value[1])


def test_unrolled_program_has_no_loop():
    def text(scan):
        stack = Stack(partial(Block, 4), LENGTH, scan=scan)
        return jax.jit(lambda p, x, y: stack.apply({"params": p}, x, y)).lower(params(), *inputs()).as_text()

    assert "while" in text(True) and "while" not in text(False)


def test_no_blocks_are_the_identity_and_an_unknown_remat_is_named():
    x, y = inputs()
    np.testing.assert_array_equal(Stack(partial(Block, 4), 0).apply({}, x, y), x)
    with pytest.raises(UserError, match="'some' is unknown; choose one of none, full"):
        Stack(partial(Block, 4), 1, "some").init(jax.random.key(0), x, y)
