"""How much faster is the causal convolution as a sum of 2-D convolutions than as one 3-D convolution?

    python benchmarks/conv.py

Every form runs in turns in one process, so that the ratios survive a noisy machine; the best of `ROUNDS` counts.
Besides the form in use (`taps`): the time taps concatenated on the input's channels, and on the output's. Writes
benchmarks/results/conv_<platform>.json: milliseconds, GFLOP/s (2 * 27 * c * d a position, three times that with the
backward pass), chip, versions, commit, date. The gain is that of `taps` over `direct`.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from record import write

from vgjax.nn.causal import conv3d_direct, conv3d_taps
from vgjax.parallel.sharding import platform

ROUNDS = 5
STRIDE = (1, 1, 1)
SHAPES = {  # b, t, h, w, channels
    "16 channels, 32x32": (8, 17, 32, 32, 16),
    "32 channels, 16x16": (8, 17, 16, 16, 32),
    "64 channels, 16x16": (8, 9, 16, 16, 64),
    "quickstart, first level": (8, 9, 8, 8, 64),
    "quickstart, latents": (8, 5, 8, 8, 64),
}


def taps_in(x: jax.Array, kernel: jax.Array, stride: tuple[int, int, int]) -> jax.Array:
    """One 2-D convolution over the time taps side by side in the input's channels."""
    frames = x.shape[1] - kernel.shape[0] + 1
    x = jnp.concatenate([x[:, i : i + frames] for i in range(kernel.shape[0])], axis=-1)
    return conv3d_taps(x, rearrange(kernel, "r p q c d -> 1 p q (r c) d"), stride)


def taps_out(x: jax.Array, kernel: jax.Array, stride: tuple[int, int, int]) -> jax.Array:
    """One 2-D convolution to the time taps side by side in the output's channels, then their sum."""
    taps, frames = kernel.shape[0], x.shape[1] - kernel.shape[0] + 1
    y = conv3d_taps(x, rearrange(kernel, "r p q c d -> 1 p q c (r d)"), stride)
    return sum(part[:, i : i + frames] for i, part in enumerate(jnp.split(y, taps, axis=-1)))


FORMS = {"direct": conv3d_direct, "taps": conv3d_taps, "taps_in": taps_in, "taps_out": taps_out}


def main() -> None:
    write(f"conv_{platform()}", {"rows": [measure(name, *shape) for name, shape in SHAPES.items()]})


def measure(name: str, b: int, t: int, h: int, w: int, c: int) -> dict:
    dtype = jnp.float32 if platform() == "cpu" else jnp.bfloat16
    x = jax.random.normal(jax.random.key(0), (b, t + 2, h, w, c), dtype)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, c, c), dtype)
    target = jax.random.normal(jax.random.key(2), (b, t, h, w, c), dtype)
    programs = {(form, part): program(FORMS[form], part, target) for form in FORMS for part in ("forward", "both")}
    best = dict.fromkeys(programs, float("inf"))
    for _ in range(ROUNDS):
        for label, run in programs.items():
            jax.block_until_ready(run(x, kernel))
            start = time.perf_counter()
            jax.block_until_ready(run(x, kernel))
            best[label] = min(best[label], time.perf_counter() - start)
    row = {"name": name, "b t h w c": [b, t, h, w, c], "dtype": jnp.dtype(dtype).name}
    for part, passes in (("forward", 1), ("both", 3)):
        for form in FORMS:
            row[f"{form}_{part}_ms"] = round(1e3 * best[form, part], 2)
            row[f"{form}_{part}_gflops"] = round(passes * 54 * b * t * h * w * c * c / best[form, part] / 1e9, 1)
        row[f"gain_{part}"] = round(best["direct", part] / best["taps", part], 2)
    return row


def program(form: Callable, part: str, target: jax.Array) -> Callable:
    if part == "forward":
        return jax.jit(lambda x, kernel: form(x, kernel, STRIDE))

    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum((form(x, kernel, STRIDE) * target).astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


if __name__ == "__main__":
    main()
