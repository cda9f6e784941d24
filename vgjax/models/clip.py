"""CLIP's two encoders (2103.00020), of OpenAI and OpenCLIP: text as tokens and one vector, an image as tokens.

Pre-norm transformers with learned positions; the text's is causal, so that its end-of-text token has seen it all.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import linen as nn

from vgjax.attention.biased import biased, causal
from vgjax.errors import UserError
from vgjax.nn.heads import QKV, Merge
from vgjax.nn.linear import Linear
from vgjax.nn.mlp import MLP
from vgjax.nn.norm import LayerNorm
from vgjax.nn.stack import Stack
from vgjax.parallel.sharding import named, shard
from vgjax.typing import Array, Bool, Dtype, Float, Int, Sizes

# OpenCLIP's, without approximation; OpenAI's, by a logistic function.
ACTS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
SIZES: Sizes = {
    # CLIPText: OpenAI's ViT-L/14 and OpenCLIP's ViT-bigG/14.
    "l": dict(vocab=49408, dim=768, heads=12, inner=3072, blocks=12, act="quick_gelu"),
    "g": dict(vocab=49408, dim=1280, heads=20, inner=5120, blocks=32, projection=1280),
    # CLIPVision: OpenCLIP's ViT-H/14, whose tokens before the last block Wan 2.1 takes.
    "h14": dict(dim=1280, heads=16, inner=5120, blocks=32, patch=14, image=224),
}
EPS = 1e-5


class CLIPText(nn.Module):
    """`CLIPText(**SIZES["l"])(ids, mask) -> (tokens, pooled)`, both behind the final norm, in `dtype`.

    positions: the longest text. inner: hidden units of the MLP. projection: width of a linear layer that the pooled
    token goes through, None for none. eos: the id whose first place is pooled; None: the highest id of the text, which
    end-of-text is in CLIP's vocabulary. remat, scan: see `nn.stack`.
    """

    vocab: int
    dim: int
    heads: int
    inner: int
    blocks: int
    positions: int = 77
    act: str = "gelu"
    projection: int | None = None
    eos: int | None = None
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, ids: Int[Array, "b m"], mask: Bool[Array, "b m"]
    ) -> tuple[Float[Array, "b m d"], Float[Array, "b p"]]:
        """ids, mask: token ids, and which of them are real."""
        if ids.shape[1] > self.positions:
            raise UserError(f"a text of {ids.shape[1]} tokens is longer than CLIP's {self.positions} positions; cut it")
        tokens = _learned(self, "tokens", "vocab", self.vocab)
        places = _learned(self, "places", None, self.positions)
        x = (tokens[ids] + places[: ids.shape[1]]).astype(self.dtype)
        x = _stack(self)(shard(x, "batch", "text", None), causal(mask))
        x = LayerNorm(EPS, affine=True, dtype=self.dtype, name="norm")(x)
        end = jnp.argmax(ids if self.eos is None else ids == self.eos, axis=1)
        pooled = x[jnp.arange(len(x)), end]
        if self.projection is not None:
            into = Linear(self.projection, ("embed", None), use_bias=False, dtype=self.dtype, name="projection")
            pooled = into(pooled)
        return x, pooled


class CLIPVision(nn.Module):
    """`CLIPVision(**SIZES["h14"])(pixels)`: the tokens of an image after `blocks` blocks, in `dtype`.

    First the class token, then the patches row by row. norm: the final norm, which stands for the state after the last
    block and is published for the class token. patch, image: sides of a patch and of the images
    it was trained with, in pixels; images of other sizes get its positions interpolated. pixels: normalised as in
    training. inner, remat, scan: as in CLIPText.
    """

    dim: int
    heads: int
    inner: int
    blocks: int
    patch: int
    image: int
    norm: bool = True
    act: str = "gelu"
    remat: str = "none"
    scan: bool = True
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b n d"]:
        (b, height, width, _), side = pixels.shape, self.image // self.patch
        if height % self.patch or width % self.patch:
            raise UserError(
                f"an image of {height}x{width} does not divide into CLIP's patches of {self.patch}; resize it"
            )
        x = rearrange(pixels, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch)
        x = Linear(self.dim, (None, "embed"), use_bias=False, dtype=self.dtype, name="patches")(x)
        whole = self.param("class", named(nn.initializers.normal(self.dim**-0.5), "embed"), (self.dim,), jnp.float32)
        x = jnp.concatenate([repeat(whole.astype(self.dtype), "d -> b 1 d", b=b), x], axis=1)
        places = _learned(self, "places", None, 1 + side**2)
        x = x + _resized(places, side, (height // self.patch, width // self.patch)).astype(self.dtype)
        x = LayerNorm(EPS, affine=True, dtype=self.dtype, name="norm")(shard(x, "batch", "text", None))
        x = _stack(self)(x)
        return LayerNorm(EPS, affine=True, dtype=self.dtype, name="norm_out")(x) if self.norm else x


class Block(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    heads: int
    inner: int
    act: Callable[[Array], Array]
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b m d"], mask: Bool[Array, "b m m"] | None = None) -> Float[Array, "b m d"]:
        norm = partial(LayerNorm, EPS, affine=True, dtype=self.dtype)
        q, k, v = QKV(self.heads, norm=False, dtype=self.dtype, name="qkv")(norm(name="norm")(x))
        x = x + Merge(x.shape[-1], dtype=self.dtype, name="merge")(biased(q, k, v, mask))
        x = x + MLP(self.inner, act=self.act, dtype=self.dtype, name="mlp")(norm(name="norm_mlp")(x))
        return shard(x, "batch", "text", None)


def _stack(model: CLIPText | CLIPVision) -> Stack:
    if model.dim % model.heads:
        raise UserError(f"dim {model.dim} of CLIP does not divide into heads {model.heads}")
    block = partial(Block, model.heads, model.inner, ACTS[model.act], model.dtype)
    return Stack(block, model.blocks, model.remat, model.scan, name="blocks")


def _learned(model: CLIPText | CLIPVision, name: str, rows_are: str | None, rows: int) -> Float[Array, "_ d"]:
    init = named(nn.initializers.normal(0.02), rows_are, "embed")
    return model.param(name, init, (rows, model.dim), jnp.float32)


def _resized(places: Float[Array, "p d"], side: int, grid: tuple[int, int]) -> Float[Array, "n d"]:
    """The positions of the class token and of a grid of patches, from those of `side` x `side`."""
    if grid == (side, side):
        return places
    square = rearrange(places[1:], "(h w) d -> h w d", h=side)
    down, across = (jnp.asarray(_cubic(side, size), jnp.float32) for size in grid)
    of_patches = jnp.einsum("ih,jw,hwd->ijd", down, across, square, precision="highest")
    return jnp.concatenate([places[:1], rearrange(of_patches, "h w d -> (h w) d")])


def _cubic(old: int, new: int) -> np.ndarray:
    """What each of `old` samples adds to each of `new`: cubic convolution (Keys 1981) of slope -3/4.

    Beyond the border stands the border's value.
    """
    at = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    taps = np.floor(at).astype(int) + np.arange(-1, 3)
    gap = np.abs(at - taps)
    near, far = (1.25 * gap - 2.25) * gap**2 + 1, -0.75 * (gap - 1) * (gap - 2) ** 2
    matrix = np.zeros((new, old))
    np.add.at(matrix, (np.arange(new)[:, None], taps.clip(0, old - 1)), np.where(gap < 1, near, far))
    return matrix
