"""Equal blocks one after the other: the only `nn.scan` in the house."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from vgjax.errors import UserError
from vgjax.typing import PyTree

_POLICIES = jax.checkpoint_policies


def _offload(*names: str) -> Any:
    """To the host's memory, and back for the backward pass."""
    return _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=names, offload_src="device", offload_dst="pinned_host"
    )


def _is_cudnn(primitive: object, *_: object, **__: object) -> bool:
    """cuDNN's attention, whose sums have no name: without them its backward pass would run it forward again."""
    return primitive.name.startswith("dot_product_attention_fwd")


# What the backward pass of a block finds saved; everything else is computed again.
REMAT = {
    "none": None,
    "full": _POLICIES.nothing_saveable,
    "attention": _POLICIES.save_from_both_policies(_POLICIES.save_only_these_names("attention"), _is_cudnn),
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,
    "offload": _offload("block"),
    "offload_attention": _offload("block", "attention"),
}


class Stack(nn.Module):
    """`length` blocks `carry = block(carry, *args)`, their parameters stacked along a leading dim called "layers".

    block: makes one block (a `functools.partial` of its class).
    remat: "none" keeps all activations, "full" only the carry, "attention" also attention outputs (with the softmax's
        sums where the kernel gives them, so that the backward pass does not run it forward again), "dots" all linears;
        "offload" keeps the carry in the host's memory, "offload_attention" also the attention outputs.
    scan: compile one block and loop, or unroll the loop: the same parameters either way.
    """

    block: Callable[..., nn.Module]
    length: int
    remat: str = "none"
    scan: bool = True

    @nn.compact
    def __call__(self, carry: PyTree, *args: PyTree) -> PyTree:
        if self.remat not in REMAT:
            raise UserError(f"remat {self.remat!r} is unknown; choose one of {', '.join(REMAT)}")
        if self.length == 0:
            return carry

        def one(block: nn.Module, carry: PyTree, *args: PyTree) -> tuple[PyTree, None]:
            return block(checkpoint_name(carry, "block"), *args), None

        if self.remat != "none":
            # Inside a scan XLA cannot merge the recomputation with the forward pass, so no barrier is needed there.
            one = nn.remat(one, policy=REMAT[self.remat], prevent_cse=not self.scan)
        layers = nn.scan(
            one,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.length,
            unroll=1 if self.scan else self.length,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return layers(self.block(name="block"), carry, *args)[0]
