"""Reconstruction errors, clip by clip."""

import jax.numpy as jnp
import numpy as np
import pytest

from vgjax.losses import mse, recon
from vgjax.losses.term import View

VIDEO = jnp.zeros((2, 1, 2, 2, 3))
RECON = jnp.stack([jnp.full((1, 2, 2, 3), 0.5), jnp.full((1, 2, 2, 3), -2.0)])
LATENT = jnp.zeros((2, 1, 1, 1, 4))


@pytest.mark.parametrize(("loss", "expected"), [(recon, [0.5, 2.0]), (mse, [0.25, 4.0])])
def test_error_of_each_clip(loss, expected):
    np.testing.assert_allclose(loss.term(View(VIDEO, RECON, LATENT, LATENT))[0], expected)


@pytest.mark.parametrize("loss", [recon, mse])
def test_bf16_is_summed_in_fp32(loss):
    error = loss.term(View(VIDEO.astype(jnp.bfloat16), RECON.astype(jnp.bfloat16), LATENT, LATENT))[0]
    assert error.dtype == jnp.float32
