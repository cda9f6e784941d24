"""PSNR and SSIM of video in [-1, 1], one number a clip, fp32."""

import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from vgjax.errors import UserError
from vgjax.typing import Array, Float

RANGE = 2.0  # white minus black
WINDOW, SIGMA = 11, 1.5


def psnr(x: Float[Array, "b t h w c"], y: Float[Array, "b t h w c"]) -> Float[Array, " b"]:
    """Peak signal-to-noise ratio in dB from the squared error of the whole clip; at most 100 dB."""
    x, y = (jnp.clip(v.astype(jnp.float32), -1.0, 1.0) for v in (x, y))
    error = reduce(jnp.square(x - y), "b ... -> b", "mean")
    return 10.0 * jnp.log10(RANGE**2 / jnp.maximum(error, RANGE**2 * 1e-10))


def ssim(x: Float[Array, "b t h w c"], y: Float[Array, "b t h w c"]) -> Float[Array, " b"]:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, mean over frames and channels."""
    height, width = x.shape[2:4]
    if min(height, width) < WINDOW:
        raise UserError(f"SSIM looks through a window of {WINDOW} pixels, frames of {height}x{width} are too small")
    # On [0, 1]: unlike PSNR, SSIM compares luminance from black up.
    x, y = (jnp.clip(v.astype(jnp.float32), -1.0, 1.0) / 2.0 + 0.5 for v in (x, y))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similar = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similar = similar / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return reduce(similar, "b ... -> b", "mean")


def _blur(x: Float[Array, "b t h w c"]) -> Float[Array, "b t i j c"]:
    """Gaussian mean over every full window."""
    window = jnp.exp(-0.5 * jnp.square((jnp.arange(WINDOW) - WINDOW // 2) / SIGMA))
    window = window / jnp.sum(window)
    batch, channels = x.shape[0], x.shape[-1]
    x = rearrange(x, "b t h w c -> (b t c) h w 1")
    for kernel in (window[:, None, None, None], window[None, :, None, None]):
        x = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
    return rearrange(x, "(b t c) h w 1 -> b t h w c", b=batch, c=channels)
