"""Rotary positions in several dimensions (Su et al. 2021; split over t, h, w as in HunyuanVideo 2024).

The frequencies of all dimensions lie one after the other in one list of `k/2`; channel j and channel j + k/2 of a head
are rotated by the j-th angle ("all first halves, then all second halves"), so a standard 1-D rotary kernel applies.
Models that pair channels (2j, 2j+1) hold the same numbers in another order: `interleaved` maps it.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from vgjax.errors import UserError
from vgjax.typing import Array, Float, Int

Rotation = tuple[Float[Array, "#b j f"], Float[Array, "#b j f"]]  # cosines and sines, one a token and frequency


def split(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head for t, h and w: 16, 56, 56 of 128, and as near to that as even numbers allow for others."""
    if head_dim % 2 or head_dim < 6:
        raise UserError(f"a head of {head_dim} channels cannot hold rotary t, h, w; take an even size of at least 6")
    time = max(4, round(head_dim / 32) * 4) - head_dim % 4
    return time, (head_dim - time) // 2, (head_dim - time) // 2


def check(dims: tuple[int, ...], head_dim: int) -> None:
    """A `UserError` unless the channels of `dims` are even and fill a head."""
    if sum(dims) != head_dim or any(d % 2 or d < 2 for d in dims):
        raise UserError(
            f"rope_dims {dims} must be even numbers that add up to the head size {head_dim}; {split(head_dim)} would do"
        )


def rotation(positions: Int[Array, "b n a"], dims: tuple[int, ...], theta: float) -> Rotation:
    """Cosines and sines for ids of `a` dimensions: angle = position * theta^(-2j/dim). Position 0 turns nothing."""
    frequencies = [theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) for dim in dims]
    angles = [positions[..., i : i + 1] * jnp.asarray(f, jnp.float32) for i, f in enumerate(frequencies)]
    angles = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "b n h k"], turn: Rotation) -> Float[Array, "b n h k"]:
    """Turns every channel pair of every head, in fp32; the product of two rotated vectors knows only their distance."""
    cos, sin = (repeat(a, "b n f -> b n 1 f") for a in turn)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def interleaved(head_dim: int) -> np.ndarray:
    """Indices that bring channels from pairs (2j, 2j+1) to our halves (j, j + k/2): `ours = theirs[..., indices]`."""
    return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])


def waves(positions: Int[Array, "b n a"], size: int) -> Float[Array, "b n f"]:
    """Fixed sine-cosine features of ids: `size` of them a dimension, wavelengths from 2 to 64 places."""
    angles = positions[..., None] * (2.0 * np.pi / np.geomspace(2.0, 64.0, size // 2))
    return rearrange(jnp.stack([jnp.sin(angles), jnp.cos(angles)]), "s b n a f -> b n (a s f)")
