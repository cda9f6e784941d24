"""Training of a video VAE: a weighted sum of loss terms on a sampled reconstruction.

A term is a file in `vgjax/losses` with `term(video, recon, mean, logvar) -> per-clip loss`; the config names it and its
weight. Each clip's latent noise depends on the key and the clip's global sample index alone, so the loss of a clip is
the same in any batch on any number of devices.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import reduce

from vgjax import losses
from vgjax.errors import UserError
from vgjax.flow.path import sample_keys
from vgjax.losses.mean import pair
from vgjax.metrics.psnr import psnr
from vgjax.typing import Array, Float, Key, Params, PyTree, UInt8


@dataclasses.dataclass(frozen=True)
class VAEObjective:
    """One player, `vae`. `weights` maps the names of files in `vgjax/losses` to the weights of their terms."""

    model: Any  # a Linen VAE with `encode` and `decode`
    weights: Mapping[str, float] | tuple[tuple[str, float], ...] = (("recon", 1.0), ("kl", 1e-6))
    players: ClassVar[tuple[str, ...]] = ("vae",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(dict(self.weights).items()))
        for name, _ in self.weights:
            if name not in _terms():
                raise UserError(f"objective.weights names the loss {name!r}; choose from {', '.join(_terms())}")

    def init(self, key: Key, batch: PyTree) -> Params:
        """Boxed parameters from a prepared batch."""
        return {"vae": self.model.init(key, batch["video"])["params"]}

    def prepare(self, frozen: PyTree, batch: PyTree) -> PyTree:
        """The batch with its uint8 video as floats in [-1, 1]."""
        return batch | {"video": from_uint8(batch["video"])}

    def loss(self, player: str, params: Params, batch: PyTree, key: Key) -> tuple[Float[Array, ""], PyTree]:
        """The weighted terms' mean over clips, and metrics: `loss`, each term, `psnr` in dB, `latent_std`."""
        own, video = {"params": params[player]}, batch["video"]
        mean, logvar = self.model.apply(own, video, method="encode")
        noise = jax.vmap(lambda k: jax.random.normal(k, mean.shape[1:]))(sample_keys(key, batch["index"]))
        recon = self.model.apply(own, mean + jnp.exp(0.5 * logvar) * noise, method="decode")
        terms = {name: _terms()[name](video, recon, mean, logvar) for name, _ in self.weights}
        total = sum(weight * terms[name] for name, weight in self.weights)
        spread = jnp.sqrt(reduce(jnp.square(mean - jnp.mean(mean)), "b ... -> b", "mean"))
        seen = {"loss": total, **terms, "psnr": psnr(video, recon), "latent_std": spread}
        return jnp.mean(total), {name: pair(values) for name, values in seen.items()}


def from_uint8(video: UInt8[Array, "b t h w 3"]) -> Float[Array, "b t h w 3"]:
    """Bytes to floats in [-1, 1]."""
    return video.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(video: Float[Array, "b t h w 3"]) -> UInt8[Array, "b t h w 3"]:
    """Floats in [-1, 1], clipped, to bytes; on the device, so that the host copies a quarter."""
    return jnp.clip(jnp.round((video + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)


@functools.cache
def _terms() -> dict[str, Callable[..., Array]]:
    modules = [importlib.import_module(f"vgjax.losses.{file.name}") for file in pkgutil.iter_modules(losses.__path__)]
    return {module.__name__.rpartition(".")[2]: module.term for module in modules if hasattr(module, "term")}
