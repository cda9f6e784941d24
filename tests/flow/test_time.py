"""Laws of the timestep: samples follow their densities, and shift means the same in training and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.errors import UserError
from vgjax.flow.path import sample_keys
from vgjax.flow.time import LogitNormal, Mode, Shift, Uniform

LAWS = [Uniform(), LogitNormal(), LogitNormal(-0.5, 0.8), Mode(1.29), Mode(-0.5)]
N = 20_000


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("factor", [1.0, 3.0, 7.0])
def test_samples_follow_the_density(law, factor):
    shift = Shift(factor)
    t = np.asarray(shift(law.sample(sample_keys(jax.random.key(0), jnp.arange(N, dtype=jnp.uint32))), 80))
    assert 0 <= t.min() and t.max() <= 1
    edges = np.linspace(0, 1, 11)
    fine = (np.arange(10_000) + 0.5) / 10_000
    density = np.asarray(shift.density(law, jnp.asarray(fine, jnp.float32), 80))
    expected = density.reshape(10, -1).mean(-1) / 10
    assert abs(expected.sum() - 1) < 0.02
    share = np.histogram(t, edges)[0] / N
    np.testing.assert_allclose(share, expected, atol=5 * np.sqrt(0.25 / N))


def test_shift_keeps_both_ends_is_monotone_and_moves_towards_noise():
    t = jnp.linspace(0, 1, 101)
    for factor in (1.0, 3.0, 7.0):
        shifted = np.asarray(Shift(factor)(t, 1))
        np.testing.assert_allclose(shifted[[0, -1]], [0, 1], atol=1e-6)
        assert (np.diff(shifted) > 0).all()
        assert (shifted <= np.asarray(t) + 1e-6).all()
    np.testing.assert_allclose(Shift(1.0)(t, 1), t, atol=1e-7)


def test_shift_is_equation_23_counted_from_noise():
    # Esser et al. 2024: sigma' = s sigma / (1 + (s - 1) sigma), with sigma = 1 - t the share of noise.
    sigma = np.linspace(0, 1, 11)
    expected = 1 - 3 * sigma / (1 + 2 * sigma)
    np.testing.assert_allclose(Shift(3.0)(jnp.asarray(1 - sigma), 1), expected, atol=1e-6)


def test_shift_grows_with_the_square_root_of_the_tokens():
    assert Shift(1.0, per_tokens=256).at(1024) == pytest.approx(2.0)
    assert Shift(3.0).at(10**6) == 3.0


def test_a_bad_law_is_refused_in_words():
    for make in (lambda: LogitNormal(scale=0.0), lambda: Mode(3.0), lambda: Shift(0.0)):
        with pytest.raises(UserError, match="must"):
            make()
