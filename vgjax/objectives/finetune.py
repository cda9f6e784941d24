"""An open transformer goes on learning by rectified flow: whole, or by low-rank adapters beside its frozen weights.

Its captions come encoded by its own encoders, its latents by its own VAE (`vgjax.encode`), so neither is here.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from vgjax.errors import UserError
from vgjax.flow.steppers import Velocity
from vgjax.nn import lora
from vgjax.objectives.flow import FlowObjective
from vgjax.typing import Array, Context, Key, Module, Params, PyTree


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

    velocity_of: the family's, of (model, variables, context). inputs: abstract arguments of the model's smallest
    call. guidance: the scale that a guidance-distilled
    model is told. times: the part of time that the model serves, onto which the timestep law is squeezed.
    """

    text: None = None  # captions come encoded
    velocity_of: Callable[..., Velocity]
    inputs: Callable[[Module], tuple[PyTree, ...]]
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

    def variables(self, params: Params) -> dict[str, PyTree]:
        """What the model computes with: its parameters, and beside them adapters, scaled."""
        if not self.lora:
            return {"params": params["velocity"]}
        return {"params": params["base"], "lora": lora.scaled(params["velocity"], self.lora.scale)}

    def bind(self, params: Params, context: Context) -> Velocity:
        """The velocity of a Context; a guidance-distilled model is told `guidance` where the Context says nothing."""
        count = len(jax.tree.leaves(context.text)[0])
        told = {"guidance": jnp.full(count, self.guidance, jnp.float32), **context.scalars}
        return self.velocity_of(self.model, self.variables(params), context._replace(scalars=told))
