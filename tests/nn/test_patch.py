"""Patches: exact inverses, ids in the order of the tokens, sizes that do not fit are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.errors import UserError
from vgjax.nn.patch import check, patchify, positions, unpatchify


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 1, 2), (3, 2, 4)])
def test_unpatchify_is_the_exact_inverse_of_patchify(patch):
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 8, 3))
    tokens = patchify(x, patch)
    grid = (6 // patch[0], 4 // patch[1], 8 // patch[2])
    assert tokens.shape == (2, np.prod(grid), 3 * np.prod(patch))
    np.testing.assert_array_equal(unpatchify(tokens, patch, grid), x)
    np.testing.assert_array_equal(patchify(unpatchify(tokens, patch, grid), patch), tokens)


def test_a_token_holds_the_pixels_at_its_position():
    patch, grid = (2, 1, 3), (2, 3, 4)
    size = [p * g for p, g in zip(patch, grid, strict=True)]
    where = jnp.stack(jnp.meshgrid(*map(jnp.arange, size), indexing="ij"), axis=-1)[None].astype(jnp.float32)
    first = patchify(where, patch)[0, :, :3]
    np.testing.assert_array_equal(first, positions(grid) * jnp.array(patch))


def test_a_latent_that_the_patch_does_not_divide_names_the_nearest_size():
    with pytest.raises(UserError, match="5x7x8 .* patches of 1x2x2; the nearest that does is 5x8x8"):
        check((5, 7, 8), (1, 2, 2))
    assert check((5, 6, 8), (1, 2, 2)) == (5, 3, 4)
