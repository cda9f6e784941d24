"""Attention of short sequences whose scores take a mask or a bias of their own: that of text and image encoders."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from vgjax.typing import Array, Bool, Float


def biased(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g k"],
    mask: Bool[Array, "#b #n m"] | None = None,
    bias: Float[Array, "h n m"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b n h k"]:
    """Softmax in fp32 of `scale * q k + bias`; a query that may see no key gets 0.

    Each of the `g` heads of keys and values serves `h / g` heads of queries that lie side by side (Ainslie et al. 2023,
    arXiv:2305.13245). scale: 1 / sqrt(head size) if None.
    """
    g = k.shape[2]
    q = rearrange(q, "b n (g r) k -> b n g r k", g=g)
    scores = jnp.einsum("bngrk,bmgk->bgrnm", q, k, preferred_element_type=jnp.float32)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + rearrange(bias, "(g r) n m -> g r n m", g=g)
    if mask is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        mask = rearrange(mask, "b n m -> b 1 1 n m")
        weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1), 0)
    o = jnp.einsum("bgrnm,bmgk->bngrk", weights.astype(v.dtype), v)
    return checkpoint_name(rearrange(o, "b n g r k -> b n (g r) k"), "attention")


def causal(mask: Bool[Array, "b m"]) -> Bool[Array, "b m m"]:
    """Each token sees the real ones up to itself."""
    return jnp.tril(jnp.ones((mask.shape[1],) * 2, bool)) & mask[:, None, :]
