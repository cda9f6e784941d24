"""The one matmul of the house: parameters are fp32, the product is computed in the compute type, adapters add theirs.

Whatever changes how a kernel is multiplied (a cast, low-rank adapters, quantised kernels) changes it here for all.
"""

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from vgjax.nn import lora
from vgjax.typing import Array, Dtype, Float


@dataclasses.dataclass(frozen=True)
class Form:
    """How a kernel meets its input, as einsums: with the kernel, and with the two factors of an adapter."""

    kernel: str
    into: str
    out: str
    several: bool = False  # the kernel's first dim counts products of the same input, each an array of its own


LINEAR = Form("...i,io->...o", "...i,ir->...r", "...r,ro->...o")
HEADS = Form("bnd,dhk->bnhk", "bnd,sdr->sbnr", "sbnr,srhk->sbnhk", several=True)
MERGE = Form("bnhk,hkd->bnd", "bnhk,hkr->bnr", "bnr,rd->bnd")


def contract(
    module: nn.Module, form: Form, x: Float[Array, "..."], kernel: Float[Array, "..."], dtype: Dtype
) -> list[Float[Array, "..."]]:
    """The products of `x` with a kernel of `module`, and with its adapters where it has some, in `dtype`."""
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    # Several products are not one matmul: XLA's CPU backend runs its backward a fifth slower (d 192, 3072 tokens), and
    # a flat "(s h k)" cannot be sharded over heads.
    out = [jnp.einsum(form.kernel, x, w) for w in (kernel if form.several else [kernel])]
    if (more := lora.delta(module, x, form.into, form.out, dtype)) is not None:
        out = [y + one for y, one in zip(out, more if form.several else [more], strict=True)]
    return out
