"""Rectified flow for text-to-video: the MM-DiT and its text encoder learn the velocity of the straight path.

`x_t = (1-t) noise + t data`, loss = mean over samples of `|v(x_t, t, text) - (data - noise)|^2` in fp32 (Liu et al.
2022; Esser et al. 2024). Each sample's loss depends on its own key alone, so batch size and device count do not matter.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from vgjax.flow.known import Given, place
from vgjax.flow.path import Straight, errors, precondition, sample_keys
from vgjax.flow.steppers import Velocity
from vgjax.flow.time import Shift, Uniform
from vgjax.losses.mean import pair
from vgjax.nn.codec import from_uint8, to_unit
from vgjax.typing import Array, Context, Float, Key, Known, Module, Params, PyTree

GIVEN = 1  # what the key of a time is folded with for the frames that are given


@dataclasses.dataclass(frozen=True)
class FlowObjective:
    """One player, `velocity`: `{"model": MM-DiT, "text": what reads the text}`. The VAE is frozen.

    With `precondition` the network gives what the best linear guess leaves over (see `flow.path.precondition`); models
    trained elsewhere as plain velocities have it off. known: which frames some samples begin with; their loss is that
    of the other frames.
    """

    model: Module  # a Linen MMDiT
    text: Module  # a TextEncoder or TextStreams
    vae: Module | None  # a Linen VAE, where something is encoded or shown
    time: Any = Uniform()
    shift: Shift = Shift()
    path: Straight = Straight()
    precondition: bool = False
    known: Given | None = None
    bins: int = 4
    players: ClassVar[tuple[str, ...]] = ("velocity",)
    of_latents: ClassVar[bool] = True
    begins_published: ClassVar[bool] = False
    adapted: ClassVar[bool] = False

    @property
    def codec(self) -> Module | None:
        return self.vae

    def base(self) -> PyTree:
        return {}

    def tokens(self, latents: tuple[int, ...]) -> int:
        return self.model.tokens(latents)

    def init(self, key: Key, batch: PyTree) -> Params:
        """Boxed parameters from a prepared batch."""
        of_model, of_text = jax.random.split(key)
        (tokens, vec), variables = self.text.init_with_output(of_text, batch["context"], method="read")
        t = jnp.zeros(batch["x"].shape[:1])
        inputs = self._seen(batch["x"], batch["context"]), t, *tokens, vec, self._told(batch["context"], t)
        model = self.model.init(of_model, *inputs)["params"]
        return {"velocity": {"model": model, "text": variables["params"]}}

    def frozen(self) -> dict[str, PyTree]:
        """What no one trains, beside the frozen VAE: nothing."""
        return {}

    def prepare(self, frozen: PyTree, batch: PyTree) -> PyTree:
        """Adds the scaled latents `x`, from `latent` or by encoding `video` (uint8) with the frozen VAE."""
        rest = {name: leaf for name, leaf in batch.items() if name not in ("video", "latent")}
        if "latent" in batch:
            z = batch["latent"].astype(jnp.float32)
        else:
            z, _ = self.vae.apply({"params": frozen["vae"]}, from_uint8(batch["video"]), method="encode")
        return rest | {"x": to_unit(z.astype(jnp.float32), frozen["stats"])}

    def loss(self, player: str, params: Params, batch: PyTree, key: Key) -> tuple[Float[Array, ""], PyTree]:
        """Mean squared velocity error and metrics: `loss`, and `loss/t0..` by timestep bin from noise to data."""
        keys = jax.vmap(lambda k: jax.random.split(k))(sample_keys(key, batch["index"]))
        n = self.model.tokens(batch["x"].shape[1:4])
        t = self.drawn(keys[:, 0], n)
        if self.known:
            of_known = jax.vmap(lambda k: jax.random.fold_in(k, GIVEN))(keys[:, 0])
            mask = self.known.masks(of_known, batch["x"].shape[1])
            batch = batch | {"context": batch["context"]._replace(known=Known(mask * batch["x"], mask))}
        errors = self.errors(params, batch, t, keys[:, 1])
        metrics = {"loss": pair(errors)}
        which = jnp.clip((t * self.bins).astype(jnp.int32), 0, self.bins - 1)
        for i in range(self.bins):
            metrics[f"loss/t{i}"] = pair(errors, (which == i).astype(jnp.float32))
        return jnp.mean(errors), metrics

    def drawn(self, keys: Key, tokens: int) -> Float[Array, " b"]:
        """Times of samples of so many tokens, from their keys."""
        return self.shift(self.time.sample(keys), tokens)

    def errors(self, params: Params, batch: PyTree, t: Float[Array, " b"], keys: Key) -> Float[Array, " b"]:
        """Squared velocity error of each sample at its time `t`, where it is not known, with noise from its key."""
        known = batch["context"].known
        unknown = None if known is None else 1 - known.mask
        return errors(self.bind(params, batch["context"]), batch["x"], t, keys, self.path, unknown)

    def bind(self, params: Params, context: Context) -> Velocity:
        """The velocity of a Context, at a scalar `t` or one a sample. The text is read once."""
        own = params["velocity"]
        tokens, vec = self.text.apply({"params": own["text"]}, context, method="read")

        def v(x: Float[Array, "b t h w c"], t: Float[Array, "..."], memory: PyTree) -> tuple[Array, PyTree]:
            t = jnp.broadcast_to(t, x.shape[:1])
            seen = self._seen(x, context)
            return self.model.apply({"params": own["model"]}, seen, t, *tokens, vec, self._told(context, t)), memory

        return precondition(v) if self.precondition else v

    def _seen(self, x: Float[Array, "b t h w c"], context: Context) -> Float[Array, "b t h w _"]:
        return place(x, context.known) if self.known else x

    def _told(self, context: Context, t: Float[Array, " b"]) -> Float[Array, " b"] | None:
        """The scale that a guidance-distilled model is told: 1 where the Context says none."""
        if not self.model.guidance:
            return None
        return context.scalars.get("guidance", jnp.ones(t.shape, jnp.float32))
