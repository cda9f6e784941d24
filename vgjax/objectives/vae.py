"""Training of a video VAE: a weighted sum of loss terms on a sampled reconstruction.

A term is a file in `vgjax/losses` (see `losses/term.py`); the config names it and its weight. Each clip's latent noise
depends on the key and the clip's global sample index alone, so its loss is the same in any batch on any number
of devices.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from einops import reduce

from vgjax.errors import UserError
from vgjax.flow.path import sample_keys
from vgjax.losses.mean import pair
from vgjax.losses.term import View, terms
from vgjax.metrics.psnr import psnr
from vgjax.nn.codec import from_uint8
from vgjax.typing import Array, Float, Key, Module, Params, PyTree


@dataclasses.dataclass(frozen=True)
class VAEObjective:
    """The player `vae`, and one more for each term that owns parameters, named as the term: it learns by the same loss.

    `weights` maps the names of files in `vgjax/losses` to the weights of their terms.
    """

    model: Module  # a Linen VAE with `encode` and `decode`
    weights: Mapping[str, float] | tuple[tuple[str, float], ...] = (("recon", 1.0), ("kl", 1e-6))
    of_latents: ClassVar[bool] = False
    begins_published: ClassVar[bool] = False
    adapted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(dict(self.weights).items()))
        for name, _ in self.weights:
            if name not in terms():
                raise UserError(f"objective.weights names the loss {name!r}; choose from {', '.join(terms())}")

    @property
    def codec(self) -> Module:
        return self.model

    def base(self) -> PyTree:
        return {}

    def tokens(self, latents: tuple[int, ...]) -> int:
        return 0

    @property
    def players(self) -> tuple[str, ...]:
        owners = jax.eval_shape(lambda: {name: terms()[name].init(jax.random.key(0)) for name, _ in self.weights})
        return ("vae", *(name for name, _ in self.weights if jax.tree.leaves(owners[name])))

    def init(self, key: Key, batch: PyTree) -> Params:
        """Boxed parameters from a prepared batch."""
        of_terms = {name: terms()[name].init(jax.random.fold_in(key, i)) for i, (name, _) in enumerate(self.weights)}
        owned = {name: params for name, params in of_terms.items() if jax.tree.leaves(params)}
        return {"vae": self.model.init(key, batch["video"])["params"]} | owned

    def frozen(self) -> dict[str, PyTree]:
        """What the terms need and no one trains: `{"losses": {term: parameters}}`."""
        needed = {name: terms()[name].frozen() for name, _ in self.weights}
        needed = {name: params for name, params in needed.items() if jax.tree.leaves(params)}
        return {"losses": needed} if needed else {}

    def prepare(self, frozen: PyTree, batch: PyTree) -> PyTree:
        """The batch with its uint8 video as floats in [-1, 1]."""
        return batch | {"video": from_uint8(batch["video"])}

    def loss(self, player: str, params: Params, batch: PyTree, key: Key) -> tuple[Float[Array, ""], PyTree]:
        """The weighted terms' mean over clips, and metrics: `loss`, each term, `psnr` in dB, `latent_std`."""
        own, video = {"params": params["vae"]}, batch["video"]
        mean, logvar = self.model.apply(own, video, method="encode")
        noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(sample_keys(key, batch["index"]))
        recon = self.model.apply(own, mean + jnp.exp(0.5 * logvar) * noise, method="decode")
        values, more = {}, {}
        for name, _ in self.weights:
            view = View(video, recon, mean, logvar, params.get(name, {}), params.get("losses", {}).get(name, {}))
            values[name], reported = terms()[name](view)
            more |= {f"{name}/{what}": value for what, value in reported.items()}
        total = sum(weight * values[name] for name, weight in self.weights)
        spread = jnp.sqrt(reduce(jnp.square(mean - jnp.mean(mean)), "b ... -> b", "mean"))
        seen = {"loss": total, **values, **more, "psnr": psnr(video, recon), "latent_std": spread}
        return jnp.mean(total), {name: pair(value) for name, value in seen.items()}
