"""KL divergence against torch, and where it is zero."""

import jax.numpy as jnp
import numpy as np
import torch

from vgjax.losses import kl
from vgjax.losses.term import View

VIDEO = jnp.zeros((2, 1, 2, 2, 3))


def test_parity_with_torch():
    mean, logvar = np.random.default_rng(0).standard_normal((2, 2, 3, 2, 2, 4)).astype(np.float32)
    ours = kl.term(View(VIDEO, VIDEO, jnp.asarray(mean), jnp.asarray(logvar)))[0]
    normal = torch.distributions.Normal
    posterior = normal(torch.tensor(mean), torch.tensor(np.exp(0.5 * logvar)))
    theirs = torch.distributions.kl_divergence(posterior, normal(0.0, 1.0)).mean(dim=(1, 2, 3, 4))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_the_standard_normal_costs_nothing():
    zero = jnp.zeros((2, 1, 1, 1, 4))
    np.testing.assert_array_equal(kl.term(View(VIDEO, VIDEO, zero, zero))[0], [0.0, 0.0])
