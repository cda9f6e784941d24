"""Clean latent frames that a sample begins with: which, and how the model is told of them.

A causal VAE makes the latents of the first frames of a clip from these frames alone, so that nothing of what is still
to come is in what is given, and a picture is encoded as the first frame of a video is.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from vgjax.errors import UserError
from vgjax.typing import Array, Float, Key, Known

CHANNELS = 1  # behind the latents


@dataclasses.dataclass(frozen=True)
class Given:
    """The `known` section: in which share of the samples is what given.

    text: nothing but the caption. first: the first latent frame, that is one picture. prefix: from one latent frame to
    all but one, each number as often. Frames are given in place, clean, as in HunyuanVideo's token replacement and
    Wan's TI2V, and a channel behind the latents says where, as in SVD (Blattmann et al. 2023).
    """

    text: float = 0.0
    first: float = 0.0
    prefix: float = 0.0

    def __post_init__(self) -> None:
        shares = dataclasses.asdict(self)
        listed = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        if not all(0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
            raise UserError(f"config.known: {listed} are no shares of the samples: each in [0, 1], together 1")

    def masks(self, keys: Key, frames: int) -> Float[Array, "b t 1 1 1"]:
        """1 at the latent frames that are given to each sample, from its key alone."""

        def count(key: Key) -> Array:
            of_mode, of_length = jax.random.split(key)
            drawn = jax.random.uniform(of_mode)
            length = jax.random.randint(of_length, (), 1, max(2, frames))
            return jnp.where(drawn < self.text, 0, jnp.where(drawn < self.text + self.first, 1, length))

        return _beginning(jax.vmap(count)(keys), frames)


def place(x: Float[Array, "b t h w c"], known: Known | None) -> Float[Array, "b t h w _"]:
    """What a model sees: noisy latents, those that are known in their place, and a channel that is 1 there."""
    if known is None:
        return jnp.pad(x, ((0, 0),) * 4 + ((0, CHANNELS),))
    mask = jnp.broadcast_to(known.mask, (*x.shape[:4], CHANNELS)).astype(x.dtype)
    return jnp.concatenate([jnp.where(known.mask > 0, known.latents, x), mask], axis=-1)


def beginning(z: Float[np.ndarray, "n k h w c"], frames: int) -> Known:
    """Latents that begin with `z` and go on unknown, `frames` latent frames in all."""
    unknown = ((0, 0), (0, frames - z.shape[1]), *((0, 0),) * 3)
    return Known(np.pad(z, unknown), np.asarray(_beginning(jnp.full(len(z), z.shape[1]), frames)))


def _beginning(counts: Array, frames: int) -> Float[Array, "b t 1 1 1"]:
    return rearrange((jnp.arange(frames) < counts[:, None]).astype(jnp.float32), "b t -> b t 1 1 1")
