"""An open transformer goes on learning by rectified flow: whole, or by low-rank adapters beside its frozen weights.

Its captions come encoded by its own encoders, its latents by its own VAE (`vgjax.encode`), so neither is here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vgjax.errors import UserError
from vgjax.flow.steppers import Velocity
from vgjax.nn import lora
from vgjax.objectives.flow import FlowObjective
from vgjax.typing import Array, Bool, Key, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters of `rank` for the kernels of the blocks that `targets` name; what they add is `alpha / rank` as much."""

    rank: int
    alpha: float = 0.0
    targets: tuple[str, ...] = lora.TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha < 0:
            raise UserError(
                f"config.lora needs rank >= 1 (or 0 for none) and alpha >= 0 (0: the rank), got rank={self.rank}, "
                f"alpha={self.alpha}"
            )

    @property
    def scale(self) -> float:
        return (self.alpha or self.rank) / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneObjective(FlowObjective):
    """One player, `velocity`: the transformer's parameters, or with `lora` its adapters, and `base` are frozen.

    velocity_of: the family's, of (model, variables, texts, guidance, what is given of an image). inputs: abstract
    arguments of the model's smallest call. length: tokens of a text. guidance: the scale that a guidance-distilled
    model is told. times: the part of time that the model serves, onto which the timestep law is squeezed.
    """

    text: Any = None  # captions come encoded
    velocity_of: Callable[..., Velocity]
    inputs: Callable[[Any], tuple[Any, ...]]
    length: int
    lora: Lora | None = None
    guidance: float = 1.0
    times: tuple[float, float] = (0.0, 1.0)
    begins_published: ClassVar[bool] = True

    @property
    def adapted(self) -> bool:
        return self.lora is not None

    def __post_init__(self) -> None:
        if self.precondition:
            raise UserError(
                "objective.precondition=True: open models say plain velocities, which a finetuning keeps; leave it out"
            )
        if len(self.times) != 2 or not 0 <= self.times[0] < self.times[1] <= 1:
            raise UserError(f"objective.times={self.times} must be two times, 0 <= first < second <= 1")

    def base(self) -> PyTree:
        if not self.adapted:
            return {}
        # The key inside: the devices of a plan are absent.
        return jax.eval_shape(lambda *x: self.model.init(jax.random.key(0), *x), *self.inputs(self.model))["params"]

    def texts(self, count: int, tokenizer: Any) -> dict[str, PyTree]:
        """Abstract captions of `count` samples, as encoders give them."""
        found = zip(("c", "mask", "vec"), self.inputs(self.model)[2:5], strict=False)
        shapes = {name: (count, *leaf.shape[1:]) for name, leaf in found if leaf is not None and name != "mask"}
        shapes["c"] = (count, self.length, shapes["c"][-1])
        text = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        return {"text": text, "mask": jax.ShapeDtypeStruct((count, self.length), jnp.bool_)}

    def init(self, key: Key, batch: PyTree) -> Params:
        """Boxed parameters; those of the transformer are at random until the published ones take their place."""
        if self.lora:
            return {"velocity": lora.born(self.base(), self.lora.rank, self.lora.targets, key)}
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.inputs(self.model))
        return {"velocity": self.model.init(key, *zeros)["params"]}

    def drawn(self, keys: Key, tokens: int) -> Array:
        """Times of samples within `times`."""
        first, last = self.times
        return first + (last - first) * super().drawn(keys, tokens)

    def bind(self, params: Params, text: PyTree, mask: Bool[Array, "b m"], guidance: float | int = 0.0) -> Velocity:
        """The velocity of these encoded captions, `{"c": tokens, "vec": pooled or absent}`; guidance 0: its own."""
        variables = {"params": params["velocity"]}
        if self.lora:
            variables = {"params": params["base"], "lora": lora.scaled(params["velocity"], self.lora.scale)}
        texts = text["c"], mask, text.get("vec")
        return self.velocity_of(self.model, variables, texts, guidance or self.guidance, {})
