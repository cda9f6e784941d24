"""Causal convolution, folding and nearest up-sampling of video: position t never sees a later frame.

The causal 3D convolution of MAGVIT-v2 (Yu et al. 2023, arXiv:2310.05737): all time padding on the left, spatial
padding symmetric. Every module streams: while the `cache` collection is mutable it keeps what its next chunk will need,
and with a cache present it continues from there, so that chunk by chunk equals the whole.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from vgjax.nn.linear import lecun
from vgjax.parallel import sharding
from vgjax.parallel.sharding import named, platform
from vgjax.typing import Array, Dtype, Float

Padding = Literal["zeros", "replicate", "edge"]
Triple = tuple[int, int, int]
Around = tuple[tuple[int, int], tuple[int, int]]  # above and below, left and right


class CausalConv3D(nn.Module):
    """Convolution over `b t h w c` that is causal in time.

    `stride` s in time turns `1 + s*k` frames into `1 + k`; a continued stream takes `s*k` frames and gives `k`.
    `padding` fills the frames before the first with zeros or with the first frame; around a frame lie zeros, under
    "edge" its outermost pixels again. Odd kernels in space, which lie with their middle on the pixels that `stride`
    keeps if `centred`, else with their upper left corner.
    """

    features: int
    kernel: Triple = (3, 3, 3)
    stride: Triple = (1, 1, 1)
    padding: Padding = "zeros"
    centred: bool = True
    names: tuple[str | None, str | None] = ("conv_in", "conv_out")
    kernel_init: Callable[..., Array] = lecun
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j d"]:
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", named(self.kernel_init, None, None, None, *self.names), shape, jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros, self.names[1]), (self.features,), jnp.float32)
        x = self._with_past(x.astype(self.dtype))
        y = conv3d(x, kernel.astype(self.dtype), self.stride, self.centred, edges=self.padding == "edge")
        return y + bias.astype(self.dtype)

    def _with_past(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s h w c"]:
        """`x` behind the frames of the stream so far, or behind the padding where it starts."""
        size, stride = self.kernel[0], self.stride[0]
        assert size >= stride, f"time kernel {size} is smaller than the stride {stride}: frames would be skipped"
        if size == 1:
            return x
        if self.has_variable("cache", "frames"):
            past = self.get_variable("cache", "frames")
        elif self.padding == "zeros":
            past = jnp.zeros((x.shape[0], size - 1, *x.shape[2:]), x.dtype)
        else:
            past = repeat(x[:, :1], "b 1 h w c -> b n h w c", n=size - 1)
        x = jnp.concatenate([past, x], axis=1)
        if self.is_mutable_collection("cache") and not self.is_initializing():
            self.put_variable("cache", "frames", x[:, x.shape[1] - (size - stride) :])
        return x


class CausalFold(nn.Module):
    """Space and time to channels: `b 1+r*k (h p) (w p) c -> b 1+k h w (c r p p)`, a continued stream `r*k -> k`.

    The first frame stands alone: it fills all `time` places of its group, or under a `padding` of zeros the last one.
    """

    time: int = 1
    space: int = 1
    padding: Padding = "replicate"

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j d"]:
        if self.time > 1 and not started(self):
            past = repeat(x[:, :1], "b 1 h w c -> b n h w c", n=self.time - 1)
            x = jnp.concatenate([jnp.zeros_like(past) if self.padding == "zeros" else past, x], axis=1)
        sizes = dict(r=self.time, p=self.space, q=self.space)
        return rearrange(x, "b (t r) (h p) (w q) c -> b t h w (c r p q)", **sizes)


class CausalUnfold(nn.Module):
    """Channels to space and time, the inverse of `CausalFold`: `1 + k` frames become `1 + time*k`."""

    time: int = 1
    space: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j d"]:
        sizes = dict(r=self.time, p=self.space, q=self.space)
        x = rearrange(x, "b t h w (c r p q) -> b (t r) (h p) (w q) c", **sizes)
        return x if self.time == 1 or started(self) else x[:, self.time - 1 :]


def started(module: nn.Module) -> bool:
    """Whether the module continues a stream; if it starts one, it remembers that."""
    found = module.has_variable("cache", "started")
    if module.is_mutable_collection("cache") and not module.is_initializing():
        module.put_variable("cache", "started", jnp.ones((), bool))
    return found


class CausalUpsample(nn.Module):
    """Nearest up-sampling: `1 + k` frames become `1 + time*k`, a continued stream `k -> time*k`."""

    time: int = 1
    space: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "b t h w c"]) -> Float[Array, "b s i j c"]:
        # Copies and a rearrangement, not image.resize: no gather.
        copies = repeat(x, "b t h w c -> b t h w (c n)", n=self.time * self.space**2)
        return CausalUnfold(self.time, self.space, name="unfold")(copies)


def conv3d(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "r p q c d"],
    stride: Triple,
    centred: bool = True,
    edges: bool = False,
) -> Float[Array, "b s i j d"]:
    """Convolution, unpadded in time and padded in space, in the form the platform does best.

    Zeros, or the `edges` again, lie around the picture, or below and to the right of it if not `centred`.

    Where the layout spreads the width over devices, each convolves its own columns and gets the missing ones from its
    neighbours, forward and backward.
    """
    # XLA's CPU backend runs 3-D convolutions 2-9x slower than the same taps as 2-D ones (benchmarks/conv.py).
    form = conv3d_taps if platform() == "cpu" else conv3d_direct
    step, axes, devices = stride[2], sharding.axes("width"), sharding.degree("width")
    rows, columns = _around(kernel, centred)
    halo = (columns[0], columns[1] + 1 - step)
    if edges:  # laid on in a copy: a convolution itself pads with zeros alone
        x, rows = jnp.pad(x, ((0, 0), (0, 0), rows, (0, 0), (0, 0)), mode="edge"), (0, 0)
    if (
        not axes
        or max(halo) == 0
        or x.shape[3] % (devices * step)
        or min(halo) < 0
        or max(halo) > x.shape[3] // devices
    ):
        if edges:
            x, columns = jnp.pad(x, ((0, 0), (0, 0), (0, 0), columns, (0, 0)), mode="edge"), (0, 0)
        return form(x, kernel, stride, (rows, columns))

    def own(x: Array, kernel: Array) -> Array:
        return form(with_neighbours(x, axes, *halo, edges), kernel, stride, (rows, (0, 0)))

    return sharding.local(own, (("batch", None, None, "width", None), (None,) * 5), x, kernel)


def with_neighbours(
    x: Float[Array, "b t h w c"], axes: tuple[str, ...], left: int, right: int, edges: bool = False
) -> Float[Array, "b t h v c"]:
    """A device's columns between the last `left` of the device before and the first `right` of the one after.

    Zeros, or the `edges` again, at the ends. Inside `sharding.local`.
    """
    devices, index = jax.lax.axis_size(axes), jax.lax.axis_index(axes)
    parts = [x]
    if left:
        before = jax.lax.ppermute(x[:, :, :, -left:], axes, [(i, i + 1) for i in range(devices - 1)])
        parts = [jnp.where(index == 0, x[:, :, :, :1], before) if edges else before, *parts]
    if right:
        after = jax.lax.ppermute(x[:, :, :, :right], axes, [(i + 1, i) for i in range(devices - 1)])
        parts = [*parts, jnp.where(index == devices - 1, x[:, :, :, -1:], after) if edges else after]
    return jnp.concatenate(parts, axis=3)


def conv3d_direct(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "r p q c d"],
    stride: Triple,
    around: Around | None = None,
) -> Float[Array, "b s i j d"]:
    """One 3-D convolution, padded in space by half a kernel, or by as many zeros as lie `around`."""
    padding = ((0, 0), *(around or _around(kernel)))
    return jax.lax.conv_general_dilated(x, kernel, stride, padding, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"))


def conv3d_taps(
    x: Float[Array, "b t h w c"],
    kernel: Float[Array, "r p q c d"],
    stride: Triple,
    around: Around | None = None,
) -> Float[Array, "b s i j d"]:
    """The sum over time taps of 2-D convolutions with the frames folded into the batch."""
    frames = (x.shape[1] - kernel.shape[0]) // stride[0] + 1
    (above, below), columns = around or _around(kernel)
    # XLA's CPU backend is 2-4x slower (14x to 3 channels) where nothing pads: so a row of zeros does, for a row of
    # results that nobody sees.
    extra = 0 if above or below or any(columns) else 1
    padding = ((above, below + extra * stride[1]), columns)

    def tap(i: int) -> Array:
        seen = x[:, i : i + (frames - 1) * stride[0] + 1 : stride[0]]
        seen = rearrange(seen, "b t h w c -> (b t) h w c")
        if kernel.shape[1:3] == (1, 1) and stride[1:] == (1, 1):
            return seen @ kernel[i, 0, 0]
        y = jax.lax.conv_general_dilated(
            seen, kernel[i], stride[1:], padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return y[:, : y.shape[1] - extra]

    return rearrange(sum(map(tap, range(kernel.shape[0]))), "(b t) h w c -> b t h w c", t=frames)


def _around(kernel: Array, centred: bool = True) -> Around:
    """How many zeros keep the size under stride 1."""
    before = [size // 2 if centred else 0 for size in kernel.shape[1:3]]
    rows, columns = ((first, size - 1 - first) for first, size in zip(before, kernel.shape[1:3], strict=True))
    return rows, columns
