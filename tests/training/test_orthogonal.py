"""Newton-Schulz iterations: the numbers of float64 in every form, whatever the scale, and one iteration saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.training import orthogonal as module
from vgjax.training.orthogonal import COEFFICIENTS, orthogonal


def matrix(rows, columns, smallest):
    u, _, v = np.linalg.svd(np.random.default_rng(0).normal(size=(rows, columns)), full_matrices=False)
    return (u * np.geomspace(smallest, 1, min(rows, columns))) @ v


def iterated(x, count):
    a, b, c = COEFFICIENTS
    for _ in range(count):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x


def by_rows(x):
    return x / np.sqrt(np.abs(x @ x.T).sum(-1, keepdims=True))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("rows,columns", [(8, 32), (24, 24), (48, 16)])
def test_the_numbers_are_those_of_float64_at_any_scale(monkeypatch, platform, rows, columns):
    monkeypatch.setattr(module, "platform", lambda: platform)
    for count, bound in ((2, 1e-5), (5, 2e-3)):
        for scale in (1e-3, 1e3):
            x = matrix(rows, columns, 1e-3)
            expected = iterated(by_rows(x), count) if rows <= columns else iterated(by_rows(x.T), count).T
            ours = orthogonal(jnp.asarray(scale * x[None], jnp.float32), count)[0]
            assert np.abs(ours - expected).max() <= bound * np.abs(expected).max()


def test_two_iterations_leave_the_singular_values_that_three_leave_behind_the_frobenius_norm():
    x = np.random.default_rng(0).normal(size=(32, 48))
    three = np.linalg.svd(iterated(x / np.linalg.norm(x), 3), compute_uv=False)
    two = np.linalg.svd(np.asarray(orthogonal(jnp.asarray(x[None], jnp.float32), 2)[0]), compute_uv=False)
    assert two.min() > three.min() and two.max() < 1.25


def test_no_gradient_gives_no_update():
    assert not jnp.any(jax.jit(lambda x: orthogonal(x, 3))(jnp.zeros((2, 4, 8))))
