"""A video as a sequence of spacetime patches, and back (Peebles & Brooks 2024 call them spacetime patches)."""

import jax.numpy as jnp
from einops import rearrange

from vgjax.errors import UserError
from vgjax.typing import Array, Float, Int

Patch = tuple[int, int, int]


def patchify(x: Float[Array, "b t h w c"], patch: Patch) -> Float[Array, "b n d"]:
    """One token a patch, in t, h, w order; inside a token pt, ph, pw, c."""
    pt, ph, pw = patch
    check(x.shape[1:4], patch)
    return rearrange(x, "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(x: Float[Array, "b n d"], patch: Patch, grid: tuple[int, int, int]) -> Float[Array, "b t h w c"]:
    """The exact inverse of `patchify`; `grid` counts patches along t, h, w."""
    (pt, ph, pw), (t, h, _) = patch, grid
    return rearrange(x, "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", t=t, h=h, pt=pt, ph=ph, pw=pw)


def positions(grid: tuple[int, int, int]) -> Int[Array, "n 3"]:
    """(t, h, w) of every token of a grid of patches, in the order of `patchify`."""
    ids = jnp.stack(jnp.meshgrid(*(jnp.arange(size) for size in grid), indexing="ij"), axis=-1)
    return rearrange(ids, "t h w three -> (t h w) three")


def check(size: tuple[int, ...], patch: Patch) -> tuple[int, int, int]:
    """The grid of patches of a latent of `size` (t, h, w), or a `UserError` that names the nearest sizes that fit."""
    if any(s < p or s % p for s, p in zip(size, patch, strict=True)):
        near = tuple(max(p, p * round(s / p)) for s, p in zip(size, patch, strict=True))
        raise UserError(
            f"a latent of t x h x w = {_x(size)} does not divide into patches of {_x(patch)}; "
            f"the nearest that does is {_x(near)}"
        )
    t, h, w = (s // p for s, p in zip(size, patch, strict=True))
    return t, h, w


def _x(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
