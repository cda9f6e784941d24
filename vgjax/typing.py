"""The shape vocabulary: jaxtyping names and the letters that mean one thing in the whole house.

`b` batch, `t h w` grid, `c` channels, `n` video tokens, `m` text tokens, `d` width, `h k` heads and head size (inside
attention only), `p` pooled width, `r` hashes a word. Annotations are checked by a pytest hook and are free at run time.
"""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped, UInt, UInt8

Dtype = Any
Key = jax.Array
Params = PyTree

__all__ = ["Array", "Bool", "Dtype", "Float", "Int", "Key", "Params", "PyTree", "Shaped", "UInt", "UInt8"]
