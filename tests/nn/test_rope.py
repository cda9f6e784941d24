"""Rotary positions: products know only distances; the layout is the one that 1-D kernels take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.errors import UserError
from vgjax.nn.rope import check, interleaved, rotate, rotation, split

DIMS, THETA = (4, 6, 6), 256.0


def heads(seed: int, n: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (2, n, 3, sum(DIMS)))


def ids(seed: int, n: int) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (1, n, 3), 0, 20)


def complex_reference(pairs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Channels (2j, 2j+1) of `b n h k` as one complex number, turned by its angle: the diffusers convention."""
    angles = np.concatenate(
        [ids[..., i : i + 1] * THETA ** (-np.arange(0, d, 2) / d) for i, d in enumerate(DIMS)], axis=-1
    )
    turned = (pairs[..., 0::2] + 1j * pairs[..., 1::2]) * np.exp(1j * angles)[:, :, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(pairs.shape)


def test_products_depend_on_relative_positions_only():
    q, k, p = heads(0, 5), heads(1, 5), ids(2, 5)

    def products(shift):
        turn = rotation(p + jnp.array(shift), DIMS, THETA)
        return jnp.einsum("bnhk,bmhk->bhnm", rotate(q, turn), rotate(k, turn))

    np.testing.assert_allclose(products((0, 0, 0)), products((7, 3, 11)), atol=1e-4)
    other = jnp.einsum("bnhk,bmhk->bhnm", rotate(q, rotation(2 * p, DIMS, THETA)), rotate(k, rotation(p, DIMS, THETA)))
    assert jnp.max(jnp.abs(other - products((0, 0, 0)))) > 0.1


def test_equals_complex_numbers_after_the_documented_permutation():
    theirs, p = np.asarray(heads(0, 7)), ids(1, 7)
    order = interleaved(sum(DIMS))
    ours = rotate(jnp.asarray(theirs[..., order]), rotation(p, DIMS, THETA))
    np.testing.assert_allclose(ours, complex_reference(theirs, np.asarray(p))[..., order], atol=1e-5)


def test_permuting_weights_makes_our_products_those_of_the_interleaved_convention():
    x, p = np.asarray(jax.random.normal(jax.random.key(0), (2, 5, 8))), ids(1, 5)
    kernels = np.asarray(jax.random.normal(jax.random.key(2), (2, 8, 3, sum(DIMS))))
    order, turn = interleaved(sum(DIMS)), rotation(p, DIMS, THETA)
    ours = [rotate(jnp.einsum("bnd,dhk->bnhk", x, kernel[..., order]), turn) for kernel in kernels]
    theirs = [complex_reference(np.einsum("bnd,dhk->bnhk", x, kernel), np.asarray(p)) for kernel in kernels]
    np.testing.assert_allclose(
        jnp.einsum("bnhk,bmhk->bhnm", *ours), np.einsum("bnhk,bmhk->bhnm", *theirs), rtol=1e-4, atol=1e-3
    )


def test_one_rotate_half_kernel_with_the_joined_frequencies_does_the_same():
    x, turn = heads(0, 4), rotation(ids(1, 4), DIMS, THETA)
    cos, sin = (jnp.concatenate([a, a], axis=-1)[:, :, None] for a in turn)
    first, second = jnp.split(x, 2, axis=-1)
    np.testing.assert_allclose(rotate(x, turn), x * cos + jnp.concatenate([-second, first], axis=-1) * sin, atol=1e-6)


def test_position_zero_turns_nothing():
    x = heads(0, 4)
    np.testing.assert_array_equal(rotate(x, rotation(jnp.zeros((1, 4, 3), jnp.int32), DIMS, THETA)), x)


def test_split_is_that_of_hunyuan_video_and_even_for_every_head_size():
    assert split(128) == (16, 56, 56)
    for head_dim in range(6, 258, 2):
        check(split(head_dim), head_dim)


def test_dims_that_do_not_fill_the_head_are_refused():
    with pytest.raises(UserError, match=r"\(8, 12, 11\).*head size 32.*would do"):
        check((8, 12, 11), 32)
    with pytest.raises(UserError, match="7 channels"):
        split(7)
