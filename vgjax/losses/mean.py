"""Means that add up: every metric is a pair (sum, count), so that shards, micro-batches and steps can be summed."""

import jax.numpy as jnp

from vgjax.typing import Array, Float, Shaped


def pair(values: Shaped[Array, "..."], weights: Shaped[Array, "..."] | None = None) -> Float[Array, "2"]:
    """`[sum of weights * values, sum of weights]` in fp32; without weights every value counts 1."""
    values = jnp.asarray(values, jnp.float32)
    if weights is None:
        return jnp.stack([jnp.sum(values), jnp.asarray(values.size, jnp.float32)])
    weights = jnp.broadcast_to(jnp.asarray(weights, jnp.float32), values.shape)
    # A value that does not count must not poison the sum: 0 * NaN is NaN.
    return jnp.stack([jnp.sum(jnp.where(weights == 0, 0.0, weights * values)), jnp.sum(weights)])
