"""Clean latent frames that a sample begins with: which, and how the model is told of them.

A causal VAE makes the first latent frame of a clip from the first frame alone, so that nothing of what is still to come
is in what is given, and a picture is encoded as the first frame of a video is. (HunyuanVideo's VAE is an exception: its
norms take the statistics of the whole clip.)
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

    text: nothing but the caption. first: the first latent frame, that is one picture. It stands clean in its place, as
    in HunyuanVideo's token replacement and Wan's TI2V, and a channel behind the latents says where, as in SVD
    (Blattmann et al. 2023).
    """

    text: float = 0.0
    first: float = 0.0

    def __post_init__(self) -> None:
        shares = dataclasses.asdict(self)
        listed = ", ".join(f"{name}={share:g}" for name, share in shares.items())
        if not all(0 <= share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
            raise UserError(f"config.known: {listed} are no shares of the samples: each in [0, 1], together 1")
        if self.text == 1:
            raise UserError("config.known: text=1 gives no sample a frame: give first a share or leave it out")

    def masks(self, keys: Key, frames: int) -> Float[Array, "b t 1 1 1"]:
        """1 at the latent frames that are given to each sample, from its key alone."""
        drawn = jax.vmap(jax.random.uniform)(keys)
        return _beginning((drawn >= self.text).astype(jnp.int32), frames)


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
