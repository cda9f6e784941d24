"""Newton-Schulz iterations: the numbers of float64 in every form, and the updates of optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import muon

from vgjax.training import optimizers
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


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("rows,columns", [(8, 32), (24, 24), (48, 16)])
def test_the_numbers_are_those_of_float64(monkeypatch, platform, rows, columns):
    monkeypatch.setattr(module, "platform", lambda: platform)
    x = matrix(rows, columns, 1e-3)
    x /= np.linalg.norm(x)
    for count, bound in ((1, 1e-5), (3, 1e-4), (5, 2e-3)):
        expected = iterated(x, count) if rows <= columns else iterated(x.T, count).T
        ours = orthogonal(jnp.asarray(x[None], jnp.float32), count)[0]
        assert np.abs(ours - expected).max() <= bound * np.abs(expected).max()


def test_updates_are_those_of_optax():
    rng = np.random.default_rng(0)
    shapes = {
        "block": {"up": {"kernel": (16, 64), "bias": (64,)}, "qkv": {"kernel": (3, 16, 2, 8)}},
        "in": {"kernel": (4, 4)},
    }

    def drawn():
        is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
        return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=is_shape)

    rate = optimizers.schedule("cosine", 0.1, 1, 10)
    theirs = muon(
        rate, ns_steps=3, adam_b2=0.95, adam_learning_rate=lambda count: 0.4 * rate(count), consistent_rms=0.2,
        muon_weight_dimension_numbers=optimizers.hidden_matrices,
    )  # fmt: skip
    params, both = drawn(), (optimizers.muon(rate, iterations=3), theirs)
    states = [tx.init(params) for tx in both]
    for _ in range(3):
        grads = drawn()
        (a, states[0]), (b, states[1]) = (tx.update(grads, old, params) for tx, old in zip(both, states, strict=True))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), a, b)
        params = optax.apply_updates(params, a)


def test_no_gradient_gives_no_update():
    assert not jnp.any(jax.jit(lambda x: orthogonal(x, 3))(jnp.zeros((2, 4, 8))))
