"""Rectified flow for text-to-video: the MM-DiT and its text encoder learn the velocity of the straight path.

`x_t = (1-t) noise + t data`, loss = mean over samples of `|v(x_t, t, text) - (data - noise)|^2` in fp32 (Liu et al.
2022; Esser et al. 2024). Each sample's loss depends on its own key alone, so batch size and device count do not matter.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import reduce

from vgjax.flow.path import Straight, precondition, sample_keys
from vgjax.flow.steppers import Velocity
from vgjax.flow.time import Shift, Uniform
from vgjax.losses.mean import pair
from vgjax.nn.codec import to_unit
from vgjax.objectives.objective import tokenized
from vgjax.objectives.vae import from_uint8
from vgjax.typing import Array, Bool, Float, Key, Params, PyTree


@dataclasses.dataclass(frozen=True)
class FlowObjective:
    """One player, `velocity`: `{"model": MM-DiT, "text": text encoder}`. The VAE is frozen.

    With `precondition` the network gives what the best linear guess leaves over (see `flow.path.precondition`); models
    trained elsewhere as plain velocities have it off.
    """

    model: Any  # a Linen MMDiT
    text: Any  # a Linen TextEncoder
    vae: Any  # a Linen VAE
    time: Any = Uniform()
    shift: Shift = Shift()
    path: Straight = Straight()
    precondition: bool = False
    bins: int = 4
    players: ClassVar[tuple[str, ...]] = ("velocity",)
    of_latents: ClassVar[bool] = True
    begins_published: ClassVar[bool] = False
    adapted: ClassVar[bool] = False

    @property
    def codec(self) -> Any:
        return self.vae

    def base(self) -> PyTree:
        return {}

    def texts(self, count: int, tokenizer: Any) -> dict[str, PyTree]:
        return tokenized(count, tokenizer)

    def tokens(self, latents: tuple[int, ...]) -> int:
        return self.model.tokens(latents)

    def init(self, key: Key, batch: PyTree) -> Params:
        """Boxed parameters from a prepared batch."""
        of_model, of_text = jax.random.split(key)
        text, (c, vec) = _init(self.text, of_text, batch["text"], batch["mask"])
        t = jnp.zeros(batch["x"].shape[:1])
        model, _ = _init(self.model, of_model, batch["x"], t, c, batch["mask"], vec, self._told(1.0, t))
        return {"velocity": {"model": model, "text": text}}

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
        """Squared velocity error of each sample at its time `t`, with noise from its key."""
        x = batch["x"]
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys)
        mixed, velocity = self.path.mix(noise, x, t)
        v, _ = self.bind(params, batch["text"], batch["mask"])(mixed, t, None)
        return reduce(jnp.square(v.astype(jnp.float32) - velocity), "b ... -> b", "mean")

    def bind(self, params: Params, text: PyTree, mask: Bool[Array, "b m"], guidance: float | int = 1.0) -> Velocity:
        """The velocity of these captions, at a scalar `t` or one a sample. The text is encoded once.

        guidance: the scale that a guidance-distilled model is told; other models know none.
        """
        own = params["velocity"]
        c, vec = self.text.apply({"params": own["text"]}, text, mask)

        def v(x: Float[Array, "b t h w c"], t: Float[Array, "..."], memory: PyTree) -> tuple[Array, PyTree]:
            t = jnp.broadcast_to(t, x.shape[:1])
            return self.model.apply({"params": own["model"]}, x, t, c, mask, vec, self._told(guidance, t)), memory

        return precondition(v) if self.precondition else v

    def _told(self, guidance: float | int, t: Float[Array, " b"]) -> Float[Array, " b"] | None:
        return jnp.full(t.shape, guidance, jnp.float32) if self.model.guidance else None


def _init(module: Any, key: Key, *inputs: Any) -> tuple[Params, Any]:
    """(boxed parameters, output on `inputs`)."""
    out, variables = module.init_with_output(key, *inputs)
    return variables["params"], out
