"""How much faster is `attention.Full` than `jax.nn.dot_product_attention` (XLA), forward and with its backward pass?

    python benchmarks/attention.py

Both run in turns in one process, so that their ratio survives a noisy machine; the best of `ROUNDS` counts. Writes
benchmarks/results/attention_<platform>.json: milliseconds, GFLOP/s by the closed form (4 n m h k forward, three times
that with backward), chip, versions, commit, date.
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from record import write

from vgjax.attention.full import Full
from vgjax.attention.segments import among
from vgjax.parallel.sharding import platform

ROUNDS = 7
SHAPES = {  # b, n, h, k
    "quickstart step": (32, 96, 6, 32),
    "256 tokens": (8, 256, 6, 32),
    "2048 tokens": (1, 2048, 12, 64),
}


def before(q, k, v, segments):
    mask = segments.q[:, None, :, None] == segments.kv[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


def main() -> None:
    write(f"attention_{platform()}", {"rows": [measure(name, *shape) for name, shape in SHAPES.items()]})


def measure(name: str, b: int, n: int, h: int, k: int) -> dict:
    dtype = jnp.float32 if platform() == "cpu" else jnp.bfloat16
    *qkv, target = jax.random.normal(jax.random.key(0), (4, b, n, h, k), dtype)
    # A tenth of the tokens of each sample is padding, as with captions.
    segments = among(jnp.broadcast_to(jnp.arange(n) < n - n // 10, (b, n)).astype(jnp.int32))
    programs = {
        f"{label} {part}": program(attention, part, target)
        for label, attention in (("before", before), ("after", Full()))
        for part in ("forward", "both")
    }
    best = dict.fromkeys(programs, float("inf"))
    for _ in range(ROUNDS):
        for label, run in programs.items():
            jax.block_until_ready(run(*qkv, segments))
            start = time.perf_counter()
            jax.block_until_ready(run(*qkv, segments))
            best[label] = min(best[label], time.perf_counter() - start)
    row = {"name": name, "b n h k": [b, n, h, k], "dtype": jnp.dtype(dtype).name}
    for part, passes in (("forward", 1), ("both", 3)):
        for label in ("before", "after"):
            seconds = best[f"{label} {part}"]
            row[f"{label}_{part}_ms"] = round(1e3 * seconds, 3)
            row[f"{label}_{part}_gflops"] = round(passes * 4 * b * h * n * n * k / seconds / 1e9, 1)
        row[f"gain_{part}"] = round(best[f"before {part}"] / best[f"after {part}"], 2)
    return row


def program(attention: Callable, part: str, target: jax.Array) -> Callable:
    if part == "forward":
        return jax.jit(attention)

    def loss(q, k, v, segments):
        return jnp.sum((attention(q, k, v, segments) * target).astype(jnp.float32))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))


if __name__ == "__main__":
    main()
