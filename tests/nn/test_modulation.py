"""AdaLN-zero does nothing at the start."""

import jax
import jax.numpy as jnp
import numpy as np

from vgjax.nn.modulation import Modulation, gated, modulate


def test_modulation_is_born_zero_so_that_a_block_is_born_the_identity():
    vec = jax.random.normal(jax.random.key(0), (2, 8))
    module = Modulation(16, 3)
    shift, scale, gate = module.apply(module.init(jax.random.key(1), vec), vec)
    x, y = jax.random.normal(jax.random.key(2), (2, 2, 5, 16))
    np.testing.assert_array_equal(modulate(x, shift, scale, jnp.float32), x)
    np.testing.assert_array_equal(gated(x, y, gate), x)


def test_vectors_come_in_the_order_of_the_linear_layer():
    module = Modulation(2, 3)
    params = {"params": {"linear": {"kernel": jnp.zeros((4, 6)), "bias": jnp.arange(6.0)}}}
    np.testing.assert_array_equal(
        jnp.stack(module.apply(params, jnp.ones((1, 4))))[:, 0, 0], [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]
    )


def test_a_bf16_residual_is_added_in_fp32():
    x, y = jnp.full((1, 1, 1), 256.0, jnp.bfloat16), jnp.full((1, 1, 1), 3.0, jnp.bfloat16)
    gate = jnp.full((1, 1, 1), 0.6)
    assert gated(x, y, gate).dtype == jnp.bfloat16
    # 0.6 rounds to 0.6016 in bf16: a product made in bf16 would still be near; the sum 257.8 rounds up to 258 once.
    assert float(gated(x, y, gate)[0, 0, 0]) == 258.0
