"""What a loss term is, and what it looks at.

A term is a file in `vgjax/losses` that exports one instance as `term`; a config names the file and its weight.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from vgjax import losses
from vgjax.typing import Array, Float, Key, Params, PyTree


@dataclasses.dataclass(frozen=True)
class View:
    """One batch as a term sees it: clips in [-1, 1], their reconstruction, and the posterior of their latents.

    `params` are the parameters that the term owns (what its `init` gave), `frozen` those that it needs and no one
    trains (what its `frozen` gave).
    """

    video: Float[Array, "b t h w c"]
    recon: Float[Array, "b t h w c"]
    mean: Float[Array, "b s i j z"]
    logvar: Float[Array, "b s i j z"]
    params: Params = dataclasses.field(default_factory=dict)
    frozen: PyTree = dataclasses.field(default_factory=dict)


@runtime_checkable
class Term(Protocol):
    """One loss, which may own parameters or need frozen ones."""

    def init(self, key: Key) -> Params:
        """The boxed parameters that the term owns and that learn; empty for none."""
        ...

    def frozen(self) -> PyTree:
        """Parameters that the term needs and that stay as they are; empty for none."""
        ...

    def __call__(self, view: View) -> tuple[Float[Array, " b"], Mapping[str, Float[Array, " b"]]]:
        """(loss of each clip in fp32, what else to report of each clip)."""
        ...


class Plain:
    """A term without parameters."""

    def init(self, key: Key) -> Params:
        return {}

    def frozen(self) -> PyTree:
        return {}


@functools.cache
def terms() -> dict[str, Term]:
    """The term of each file that has one, by the file's name."""
    modules = [importlib.import_module(f"vgjax.losses.{file.name}") for file in pkgutil.iter_modules(losses.__path__)]
    return {module.__name__.rpartition(".")[2]: module.term for module in modules if hasattr(module, "term")}
