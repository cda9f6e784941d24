"""What a device of the ring does with each block of keys, in every form of it; the ring itself is in test_parallel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import naive_attention
from einops import rearrange

from vgjax.attention import full, splash
from vgjax.attention.ring import merge
from vgjax.attention.segments import Segments

FORMS = {
    "chunks": (partial(full.with_lse, chunk=48), partial(full.gradients, chunk=48)),
    "splash": (partial(splash.with_lse, interpret=True), partial(splash.gradients, interpret=True)),
}
CUT = 90  # of 200 keys


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("segmented", [False, True])
def test_blocks_of_keys_make_the_whole_in_value_and_gradient(form, segmented):
    with_lse, gradients = FORMS[form]
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, n, 2, 16)) for key, n in zip(keys, (130, 200, 200), strict=True))
    segments = None
    if segmented:  # id 0 is padding; of id 3 there are queries but no keys, and id 2 has keys in the second block alone
        of_q = jnp.arange(130) * 4 // 130
        of_k = jnp.where(jnp.arange(200) < 120, jnp.arange(200) % 2, 2)
        segments = Segments(jnp.stack([of_q, of_q[::-1]]), jnp.stack([of_k, of_k]))
    parts = (slice(0, CUT), slice(CUT, None))

    @jax.jit
    def by_blocks(q, k, v):
        expected_o = naive_attention(q, k, v, segments)
        do = rearrange(jax.grad(lambda o: jnp.sum(jnp.sin(o)))(expected_o), "b n h k -> b h n k")
        q, k, v = (rearrange(x, "b n h k -> b h n k") for x in (q, k, v))
        ids = [None if segments is None else Segments(segments.q, segments.kv[:, part]) for part in parts]
        blocks = [(q, k[:, :, part], v[:, :, part], s) for part, s in zip(parts, ids, strict=True)]
        o, lse = merge(*(with_lse(*block) for block in blocks))
        (dq, *first), (more, *second) = (gradients(*block, o, lse, do) for block in blocks)
        whole = [jnp.concatenate(pair, axis=2) for pair in zip(first, second, strict=True)]
        return [rearrange(x, "b h n k -> b n h k") for x in (o, dq + more, *whole)]

    def loss(q, k, v):
        return jnp.sum(jnp.sin(naive_attention(q, k, v, segments)))

    expected = [naive_attention(q, k, v, segments), *jax.grad(loss, argnums=(0, 1, 2))(q, k, v)]
    for ours, theirs in zip(by_blocks(q, k, v), expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
