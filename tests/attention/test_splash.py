"""The TPU kernel is the attention that every other form is; interpreted here, compiled by test_topology."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import naive_attention, value_and_gradients

from vgjax.attention.segments import Segments, among
from vgjax.attention.splash import KEYS, QUERIES, splash, tile

CASES = {  # n, m, head size, segments
    "nothing divides": (150, 300, 16, None),
    "padded and packed": (200, 200, 32, (3, 2)),
    "queries without keys": (130, 60, 8, (4, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_splash_equals_naive_attention_in_value_and_gradient(case):
    n, m, size, parts = CASES[case]
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, rows, 2, size)) for key, rows in zip(keys, (n, m, m), strict=True))
    segments = None
    if parts:  # ids 0 (padding) to parts - 1, in runs; another order in the second sample
        ids = [jnp.stack([jnp.arange(rows) * count // rows, jnp.arange(rows)[::-1] * count // rows])
               for rows, count in zip((n, m), parts, strict=True)]  # fmt: skip
        segments = among(ids[0]) if n == m else Segments(*ids)

    @jax.jit
    def attention(q, k, v):
        return splash(q, k, v, segments, interpret=True)

    expected = value_and_gradients(lambda q, k, v: naive_attention(q, k, v, segments), q, k, v)
    for ours, theirs in zip(value_and_gradients(attention, q, k, v), expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("candidates", [QUERIES, KEYS])
@pytest.mark.parametrize("size", [1, 77, 512, 1025, 14850, 33000, 118800])
def test_tiles_pad_a_sequence_by_little(size, candidates):
    each = tile(size, candidates)
    padded = -(-size // each) * each
    assert each % 128 == 0 and each <= candidates[-1]
    assert padded - size < max(256, 0.06 * size)
