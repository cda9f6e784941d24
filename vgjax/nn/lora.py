"""Low-rank adaptation (Hu et al. 2021, arXiv:2106.09685): beside a frozen kernel W two small ones learn, `W + a b`.

`a` and `b` are variables of the collection `lora`, at the path of the module whose kernel they adapt; a module without
them is as it was. `b` is born zero, so training starts from the model as it is.
"""

import math
import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

from vgjax.errors import UserError
from vgjax.parallel.sharding import Named
from vgjax.typing import Array, Config, Dtype, Float, Json, Key, Params, PyTree

TARGETS = ("qkv", "q", "text_kv", "image_kv", "merge", "mlp")  # attention and MLP of every model
# Dims of a kernel, layers aside (Linear, Merge, heads): how many of them count kernels, and end its inputs.
DIMS = {2: (0, 1), 3: (0, 2), 4: (1, 2)}
# Dims that a kernel has more than `a`, and than `b`: their product.
PRODUCTS = {
    (0, 0): "...ir,...ro->...io",
    (0, 1): "...hkr,...ro->...hko",
    (1, 0): "...sir,...srhk->...sihk",
}


def delta(module: nn.Module, x: Float[Array, "..."], into: str, out: str, dtype: Dtype) -> Float[Array, "..."] | None:
    """What the module's `a` (einsum `into`) and `b` (`out`) add to its output; None where it has none."""
    if not module.has_variable("lora", "a"):
        return None
    a, b = (module.get_variable("lora", name).astype(dtype) for name in "ab")
    return jnp.einsum(out, jnp.einsum(into, x.astype(dtype), a), b)


def born(boxed: PyTree, rank: int, targets: Sequence[str], key: Key) -> PyTree:
    """The boxed `lora` collection of a model's (abstract) boxed parameters: `a` normal, `b` zero, fp32.

    Adapted is every kernel of a stack of blocks whose path has one of `targets` in it.
    """
    found: Json = {}
    leaves, _ = jax.tree_util.tree_flatten_with_path(boxed, is_leaf=lambda leaf: isinstance(leaf, Named))
    for path, box in leaves:
        *names, leaf = (entry.key for entry in path)
        if leaf != "kernel" or "layers" not in box.names or not set(names) & set(targets):
            continue
        layers = box.names.count("layers")
        several, ends = (layers + dim for dim in DIMS[len(box.names) - layers])
        shape, at = box.value.shape, found
        own = jax.random.fold_in(key, zlib.crc32("/".join(names).encode()))
        std = math.prod(shape[several:ends]) ** -0.5
        for name in names:
            at = at.setdefault(name, {})
        at["a"] = Named(std * jax.random.normal(own, (*shape[:ends], rank)), (*box.names[:ends], None))
        outer = (*shape[:several], rank, *shape[ends:]), (*box.names[:several], None, *box.names[ends:])
        at["b"] = Named(jnp.zeros(outer[0]), outer[1])
    if not found:
        raise UserError(
            f"config.lora.targets={tuple(targets)} name no kernel of the model's blocks: try qkv, merge, mlp"
        )
    return found


def scaled(lora: Params, scale: float) -> Params:
    """The collection whose products are `scale` times as large."""
    return jax.tree_util.tree_map_with_path(lambda path, x: scale * x if path[-1].key == "b" else x, lora)


def merged(params: Config, lora: Config, dtype: Dtype | None = None) -> Params:
    """The parameters of the model without a `lora` collection that is the same function.

    Adapted kernels come in `dtype`, or in their own. The sum is fp32 and rounded once: in bf16 to within 2^-8 of each
    number, so that a product below this is lost.
    """
    if "a" in lora:
        a, b, kernel = lora["a"], lora["b"], params["kernel"]
        product = jnp.einsum(PRODUCTS[kernel.ndim - a.ndim, kernel.ndim - b.ndim], a, b, precision="highest")
        return {**params, "kernel": (kernel.astype(jnp.float32) + product).astype(dtype or kernel.dtype)}
    return {**params, **{name: merged(params[name], inner, dtype) for name, inner in lora.items()}}
