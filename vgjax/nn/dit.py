"""What the video transformers share: the check of what they are given, and their last layer."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from flax import linen as nn

from vgjax.errors import UserError
from vgjax.nn import rope
from vgjax.nn.linear import Linear
from vgjax.nn.modulation import modulate
from vgjax.nn.norm import LayerNorm
from vgjax.typing import Array, Dtype, Float


def check(
    dim: int, heads: int, rope_dims: Callable[[], tuple[int, int, int]], widths: Mapping[str, tuple[int, Array]]
) -> None:
    """A `UserError` for sizes that do not fit each other; `widths`: name -> (width of the model, input)."""
    if dim % heads:
        raise UserError(f"dim {dim} does not divide into heads {heads}")
    rope.check(rope_dims(), dim // heads)
    for name, (width, given) in widths.items():
        if given.shape[-1] != width:
            raise UserError(f"{name} is {width} but the input has a last dim of {given.shape[-1]}")


def last(
    x: Float[Array, "b n d"], shift: Float[Array, "b _ d"], scale: Float[Array, "b _ d"], features: int, dtype: Dtype
) -> Float[Array, "b n a"]:
    """Norm, shift and scale, and the linear layer `velocity` of the calling module, born zero: fp32."""
    x = modulate(LayerNorm(name="norm")(x), shift, scale, dtype)
    zeros = nn.initializers.zeros
    return Linear(features, ("embed", None), kernel_init=zeros, dtype=dtype, name="velocity")(x).astype(jnp.float32)
