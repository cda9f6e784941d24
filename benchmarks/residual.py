"""What bf16 costs by depth, with the residual stream in bf16 and in fp32: error of the velocity against fp32.

    python benchmarks/residual.py [--dim 256] [--depths 6 20 40 60]

Random weights (gates too, which are born zero) and inputs; the error is the norm of the difference over the norm, of
one forward pass over 192 video and 32 text tokens. Writes benchmarks/results/residual.json.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
from record import write

from vgjax.models.crossdit import CrossDiT
from vgjax.models.mmdit import MMDiT
from vgjax.parallel.sharding import unboxed
from vgjax.typing import Key, Params


def model(name: str, dim: int, depth: int, **types: Any) -> MMDiT | CrossDiT:
    """A transformer with so many blocks; a third of MM-DiT's are dual, as HunyuanVideo's."""
    widths = dict(dim=dim, heads=dim // 64, channels=16, text_dim=dim, **types)
    if name == "crossdit":
        return CrossDiT(inner=dim * 27 // 10, blocks=depth, **widths)
    return MMDiT(double_blocks=depth // 3, single_blocks=depth - depth // 3, pooled_dim=dim, **widths)


def filled(params: Params, key: Key) -> Params:
    """Leaves that are born zero (gates, the output) are random, with the spread of the other kernels."""

    def fill(x: jax.Array, key: Key) -> jax.Array:
        std = x.shape[-2] ** -0.5 if x.ndim > 1 else 0.02
        return jnp.where(jnp.any(x != 0), x, std * jax.random.normal(key, x.shape))

    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten(map(fill, leaves, jax.random.split(key, len(leaves))))


def errors(name: str, dim: int, depth: int, seed: int) -> dict[str, float]:
    """Relative error of one forward pass in bf16, by the type of the stream."""
    key, video = jax.random.key(seed), jax.random.normal(jax.random.key(seed + 1), (1, 3, 16, 16, 16))
    text, mask = jax.random.normal(jax.random.key(seed + 2), (1, 32, dim)), jnp.ones((1, 32), bool)
    inputs = video, jnp.full((1,), 0.3), text, mask, text[:, 0]
    exact = model(name, dim, depth)
    params = jax.jit(lambda: filled(unboxed(exact.init(key, *inputs)["params"]), key))()
    expected = jax.jit(exact.apply)({"params": params}, *inputs)
    found = {}
    for stream in ("bfloat16", "float32"):
        rounded = jax.jit(model(name, dim, depth, dtype=jnp.bfloat16, stream=jnp.dtype(stream)).apply)
        apart = rounded({"params": params}, *inputs) - expected
        found[stream] = float(jnp.linalg.norm(apart) / jnp.linalg.norm(expected))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depths", type=int, nargs="+", default=[6, 20, 40, 60])
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for name in ("crossdit", "mmdit"):
        for depth in args.depths:
            each = [errors(name, args.dim, depth, seed) for seed in range(args.seeds)]
            rows.append({"model": name, "blocks": depth, **{k: [e[k] for e in each] for k in each[0]}})
            print(rows[-1], flush=True)
    write("residual", {"dim": args.dim, "rows": rows})


if __name__ == "__main__":
    main()
