"""AdaLN-zero does nothing at the start."""

import jax
import jax.numpy as jnp
import numpy as np

from vgjax.nn.modulation import Modulation, gated, modulate


def test_modulation_is_born_zero_so_that_a_block_is_born_the_identity():
    vec, samples = jax.random.normal(jax.random.key(0), (2, 1, 8)), jnp.ones((2, 5), jnp.int32)
    module = Modulation(16, 3)
    shift, scale, gate = module.apply(module.init(jax.random.key(1), vec, samples), vec, samples)
    x, y = jax.random.normal(jax.random.key(2), (2, 2, 5, 16))
    np.testing.assert_array_equal(modulate(x, shift, scale, jnp.float32), x)
    np.testing.assert_array_equal(gated(x, y, gate), x)


def test_vectors_come_in_the_order_of_the_linear_layer():
    module = Modulation(2, 3)
    params = {"params": {"linear": {"kernel": jnp.zeros((4, 6)), "bias": jnp.arange(6.0)}}}
    np.testing.assert_array_equal(
        jnp.stack(module.apply(params, jnp.ones((1, 1, 4)), jnp.ones((1, 1), jnp.int32)))[:, 0, 0],
        [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]],
    )


def test_a_token_of_a_packed_row_takes_the_vectors_of_its_sample():
    module, samples = Modulation(3, 2), jnp.array([[2, 1, 1, 0], [1, 2, 0, 2]])
    kernel = jax.random.normal(jax.random.key(0), (4, 6))
    vec = jax.random.normal(jax.random.key(1), (2, 2, 4))
    shift, _ = module.apply({"params": {"linear": {"kernel": kernel, "bias": jnp.zeros(6)}}}, vec, samples)
    for row, of in enumerate(samples):
        for token, sample in enumerate(of):
            expected = vec[row, sample - 1] @ kernel[:, :3] if sample else jnp.zeros(3)
            np.testing.assert_allclose(shift[row, token], expected, rtol=1e-5, atol=1e-6)


def test_a_bf16_residual_is_added_in_fp32():
    x, y = jnp.full((1, 1, 1), 256.0, jnp.bfloat16), jnp.full((1, 1, 1), 3.0, jnp.bfloat16)
    gate = jnp.full((1, 1, 1), 0.6)
    assert gated(x, y, gate).dtype == jnp.bfloat16
    # 0.6 rounds to 0.6016 in bf16: a product made in bf16 would still be near; the sum 257.8 rounds up to 258 once.
    assert float(gated(x, y, gate)[0, 0, 0]) == 258.0
