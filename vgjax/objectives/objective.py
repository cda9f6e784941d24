"""What an objective is: it says what it trains and from what; nobody asks it for its class."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from vgjax.typing import Array, Float, Key, Params, PyTree


@runtime_checkable
class Objective(Protocol):
    """What is trained. `params` are dicts by player; a batch is a dict of arrays with leading dim `b`."""

    @property
    def players(self) -> tuple[str, ...]:
        """Names of who is trained, in the order in which they learn within a step."""

    @property
    def codec(self) -> Any:
        """The VAE between videos and latents: trained, or frozen."""

    @property
    def of_latents(self) -> bool:
        """Whether it learns from latents and captions (and can be sampled), or from videos alone."""

    @property
    def begins_published(self) -> bool:
        """Whether its parameters begin as open weights, or at random."""

    @property
    def adapted(self) -> bool:
        """Whether adapters learn beside frozen parameters, those of `base`."""

    def base(self) -> PyTree:
        """Abstract parameters, in their boxes of names, beside which adapters learn; empty without adapters."""

    def frozen(self) -> dict[str, PyTree]:
        """Parameters that no one trains, beside a frozen VAE."""

    def texts(self, count: int, tokenizer: Any) -> dict[str, PyTree]:
        """Abstract `text` and `mask` of so many captions, as a batch has them."""

    def tokens(self, latents: tuple[int, ...]) -> int:
        """Tokens of a latent grid `t h w` that attend to one another, 0 where none do; a `UserError` for one that does
        not fit."""

    def init(self, key: Key, batch: PyTree) -> Params:
        """Boxed parameters of every player, from a prepared batch."""

    def prepare(self, frozen: PyTree, batch: PyTree) -> PyTree:
        """A raw batch as `loss` takes it."""

    def loss(self, player: str, params: Params, batch: PyTree, key: Key) -> tuple[Float[Array, ""], PyTree]:
        """(mean loss of a player, metrics as pairs (sum, count)); `params` holds all players and what is frozen."""


def tokenized(count: int, tokenizer: Any) -> dict[str, PyTree]:
    """Abstract captions as token ids, `text` int32 `b m r` and `mask` bool `b m`."""
    shape = count, tokenizer.length, tokenizer.hashes
    return {"text": jax.ShapeDtypeStruct(shape, jnp.int32), "mask": jax.ShapeDtypeStruct(shape[:2], jnp.bool_)}
