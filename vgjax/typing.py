"""The words of the house that more than one package speaks: shapes by jaxtyping, and a type for each noun.

`b` batch, `t h w` grid, `c` channels, `n` video tokens, `m` text tokens, `d` width, `h k` heads and head size (inside
attention only), `p` pooled width, `r` hashes a word. Annotations are checked by a pytest hook and are free at run time.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped, UInt, UInt8

Dtype = Any  # whatever numpy takes for one
Key = jax.Array
Params = PyTree
Json = dict[str, Any]  # an object of a JSON file, or a section of a config as keyword arguments
Config = Mapping[str, Any]  # the same, only read
Sizes = dict[str, Json]  # keyword arguments of a model's published sizes


@runtime_checkable
class Module(Protocol):
    """A Linen module, used as pure functions."""

    def init(self, *args: Any, **kwargs: Any) -> PyTree: ...

    def apply(self, *args: Any, **kwargs: Any) -> PyTree: ...


@runtime_checkable
class Attention(Protocol):
    """A frozen dataclass without parameters; wrappers compose, as `Ulysses(Full())`."""

    def __call__(self, q: Array, k: Array, v: Array, *segments: Any) -> Array:
        """`b n h k` of queries `b n h k`, keys and values `b m h k`, of those of the same segment."""


class Tokens(NamedTuple):
    """A stream of tokens: `c` int ids `b m r` or embeddings `b m e`, `mask` bool `b m` which of them are real."""

    c: Array
    mask: Array


class Known(NamedTuple):
    """What of the latents is given: `latents` f32 `b t h w c`, `mask` f32 `b t 1 1 1`, 1 where they are clean."""

    latents: Array
    mask: Array


class Context(NamedTuple):
    """All that a velocity is conditioned on, a row a sample; what a model does not take is left out.

    text: streams of tokens by name. vec: pooled text `b p`. known: clean latent frames. channels: behind the latents,
    `b t h w k`. scalars: numbers by name, f32 `b`; `guidance` is the scale that a guidance-distilled model is told.
    """

    text: Mapping[str, Tokens]
    vec: Array | None = None
    known: Known | None = None
    channels: Array | None = None
    scalars: Mapping[str, Array] = {}

    @property
    def tokens(self) -> int:
        """Text tokens of a row, padding included."""
        return sum(stream.mask.shape[1] for stream in self.text.values())


@runtime_checkable
class Conditioner(Protocol):
    """Captions to the text of a Context."""

    @property
    def frozen(self) -> bool:
        """Whether captions are encoded before the training, by models that nobody trains."""

    def __call__(self, captions: Sequence[str]) -> Context:
        """Rows of the captions, on the host."""

    def abstract(self, count: int) -> Context:
        """The shapes of so many rows."""

    def placed(self, where: Any) -> "Conditioner":
        """The same with its models on a placement, None for one device."""

    def cut(self, captions: Sequence[str]) -> list[str]:
        """Sentences on captions that are longer than what is read of them."""


@runtime_checkable
class Learnable(Protocol):
    """What the train step takes. `params` are dicts by player; a batch is a dict of arrays with leading dim `b`."""

    @property
    def players(self) -> tuple[str, ...]:
        """Names of who is trained, in the order in which they learn within a step."""

    def init(self, key: Key, batch: PyTree) -> Params:
        """Boxed parameters of every player, from a prepared batch."""

    def prepare(self, frozen: PyTree, batch: PyTree) -> PyTree:
        """A raw batch as `loss` takes it."""

    def loss(self, player: str, params: Params, batch: PyTree, key: Key) -> tuple[Float[Array, ""], PyTree]:
        """(mean loss of a player, metrics as pairs (sum, count)); `params` holds all players and what is frozen."""


@runtime_checkable
class Objective(Learnable, Protocol):
    """What is trained, and what the programs around the train step ask of it."""

    @property
    def codec(self) -> Module:
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

    def tokens(self, latents: tuple[int, ...]) -> int:
        """Tokens of a latent grid `t h w` that attend to one another, 0 where none do; a `UserError` for one that does
        not fit."""


__all__ = [
    "Array",
    "Attention",
    "Bool",
    "Conditioner",
    "Config",
    "Context",
    "Dtype",
    "Float",
    "Int",
    "Json",
    "Key",
    "Known",
    "Learnable",
    "Module",
    "Objective",
    "Params",
    "PyTree",
    "Shaped",
    "Sizes",
    "Tokens",
    "UInt",
    "UInt8",
]
