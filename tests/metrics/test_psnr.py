"""PSNR and SSIM against their definitions."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate1d

from vgjax.errors import UserError
from vgjax.metrics.psnr import psnr, ssim


def clips(seed=0, noise=0.2, size=(14, 16)):
    generator = np.random.default_rng(seed)
    x = generator.uniform(-0.7, 0.7, (2, 3, *size, 3)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(x + noise * generator.standard_normal(x.shape).astype(np.float32))


def test_psnr_of_a_known_error():
    x = jnp.zeros((2, 1, 4, 4, 3))
    y = x.at[0].set(0.2).at[1].set(0.02)
    np.testing.assert_allclose(psnr(x, y), [20.0, 40.0], rtol=1e-5)


def test_psnr_judges_what_can_be_shown_and_is_finite_for_equal_clips():
    x = jnp.ones((1, 1, 4, 4, 3))
    np.testing.assert_allclose(psnr(x, x + 3.0), [100.0], rtol=1e-5)


def slow_ssim(x, y):
    """Wang et al. 2004, one frame and channel at a time, in float64 on [0, 1]."""
    window = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window /= window.sum()

    def blur(image):
        for axis in (0, 1):
            image = correlate1d(image, window, axis)
        return image[5:-5, 5:-5]

    scores = []
    for t in range(x.shape[0]):
        for c in range(3):
            a, b = (np.clip(np.asarray(v[t, ..., c], np.float64) / 2 + 0.5, 0, 1) for v in (x, y))
            mean_a, mean_b = blur(a), blur(b)
            var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
            covariance = blur(a * b) - mean_a * mean_b
            top = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
            scores.append(np.mean(top / ((mean_a**2 + mean_b**2 + 0.01**2) * (var_a + var_b + 0.03**2))))
    return np.mean(scores)


def test_ssim_equals_its_definition():
    x, y = clips()
    np.testing.assert_allclose(ssim(x, y), [slow_ssim(x[i], y[i]) for i in range(2)], rtol=1e-4)
    assert jnp.all(ssim(x, y) < 0.95)


def test_ssim_of_equal_clips_is_one():
    x, _ = clips()
    np.testing.assert_allclose(ssim(x, x), 1.0, rtol=1e-5)


def test_ssim_refuses_frames_smaller_than_its_window():
    x, y = clips(size=(10, 16))
    with pytest.raises(UserError, match="window of 11 pixels, frames of 10x16"):
        ssim(x, y)
