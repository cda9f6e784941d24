"""Given frames: in the asked shares, of the sample's key alone, in place for the model and out of its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.errors import UserError
from vgjax.flow import path
from vgjax.flow.known import Given, beginning, place
from vgjax.typing import Known


def shares(given, frames, number=2000):
    masks = given.masks(path.sample_keys(jax.random.key(0), jnp.arange(number, dtype=jnp.uint32)), frames)
    assert masks.shape == (number, frames, 1, 1, 1)
    found = masks[:, :, 0, 0, 0].sum(1).astype(int)
    assert (masks[:, :, 0, 0, 0] == (np.arange(frames) < found[:, None])).all()  # from the first frame on
    return np.bincount(found, minlength=frames + 1) / number


def test_each_mode_has_its_share():
    np.testing.assert_allclose(shares(Given(text=0.7, first=0.3), 4), [0.7, 0.3, 0, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(Given(first=1.0), 2), [0, 1, 0])


def test_what_is_given_depends_on_the_sample_alone():
    given, key = Given(text=0.5, first=0.5), jax.random.key(3)
    all_of_them = given.masks(path.sample_keys(key, jnp.arange(8, dtype=jnp.uint32)), 5)
    np.testing.assert_array_equal(
        given.masks(path.sample_keys(key, jnp.arange(4, 8, dtype=jnp.uint32)), 5), all_of_them[4:]
    )


def test_the_model_sees_given_frames_clean_and_is_told_where():
    x, z = np.ones((2, 3, 2, 2, 4), np.float32), np.full((2, 1, 2, 2, 4), 7, np.float32)
    seen = place(jnp.asarray(x), jax.tree.map(jnp.asarray, beginning(z, 3)))
    assert (seen[:, 0, ..., :4] == 7).all() and (seen[:, 1:, ..., :4] == 1).all()
    assert (seen[:, 0, ..., 4] == 1).all() and (seen[:, 1:, ..., 4] == 0).all()
    nothing = place(jnp.asarray(x), None)
    assert (nothing[..., :4] == x).all() and (nothing[..., 4] == 0).all()


def test_the_loss_is_that_of_the_other_frames():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 2, 4)), jnp.float32)
    mask = Known(x, jnp.zeros((2, 3, 1, 1, 1)).at[:, 0].set(1)).mask
    keys, t = path.sample_keys(jax.random.key(0), jnp.arange(2, dtype=jnp.uint32)), jnp.full(2, 0.3)
    wrong = lambda at: lambda x, t, memory: (jnp.zeros_like(x).at[:, at].add(1e3), memory)  # noqa: E731
    right, other = (path.errors(wrong(at), x, t, keys, where=1 - mask) for at in (0, 1))
    assert (right < 5).all() and (other > 1e5).all()
    np.testing.assert_allclose(
        path.errors(wrong(0), x, t, keys, where=jnp.ones_like(mask)), path.errors(wrong(0), x, t, keys)
    )


def test_a_section_that_gives_nothing_is_refused():
    with pytest.raises(UserError, match="text=1 gives no sample a frame"):
        Given(text=1.0)


@pytest.mark.parametrize("shares", [dict(text=0.5), dict(text=0.7, first=0.4), dict(text=1.5, first=-0.5), {}])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(UserError, match="config.known: text=.* together 1"):
        Given(**shares)
