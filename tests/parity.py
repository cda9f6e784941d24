"""The same weights in a torch reference and in ours, and how near two outputs must be."""

import jax
import numpy as np
from einops import rearrange

from vgjax.open import tables
from vgjax.parallel.sharding import unboxed


def randomised(module, seed=0, size=0.1):
    """A torch module in eval mode whose every parameter is moved at random, zeros included."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += size * torch.randn(parameter.shape)
    return module.eval()


def load(table, model, theirs, *inputs, ignored=(), **kwargs):
    """Our parameters, by the weight table, from a torch module's; the table is checked in both directions."""
    wanted = unboxed(jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, **kwargs)["params"]))
    tensors = {name: tensor.detach().numpy() for name, tensor in theirs.state_dict().items()}
    given = {name: (tensor.shape, str(tensor.dtype)) for name, tensor in tensors.items()}
    assert not tables.uncovered(table, wanted)
    assert not tables.mismatches(table, wanted, given, ignored)
    params = tables.load(table, wanted, tensors.__getitem__)
    for name, tensor in tables.export(table, params):
        np.testing.assert_array_equal(tensor, tensors[name])
    return params


def to_torch(x):
    """Our video or latents, channels last, as a torch module takes them."""
    import torch

    return torch.tensor(rearrange(np.asarray(x), "b t h w c -> b c t h w"))


def of_torch(x):
    """What a torch module made of them, as ours."""
    return rearrange(x.detach().numpy(), "b c t h w -> b t h w c")


def near(ours, theirs, largest=1e-4, mean=1e-5):
    """Maximum and mean error, of the scale (standard deviation) of what the reference says."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    error, scale = np.abs(ours - theirs), np.std(theirs)
    assert scale > 0 and np.isfinite(ours).all()
    assert error.max() <= largest * scale, f"largest error {error.max() / scale:.2e} of the scale"
    assert error.mean() <= mean * scale, f"mean error {error.mean() / scale:.2e} of the scale"


def same_gradients(table, ours, theirs, largest=1e-3):
    """Every gradient of a torch module equals ours, relative to the norm of it."""
    given = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    exported = dict(tables.export(table, ours))
    assert exported.keys() == given.keys()
    floor = 1e-6 * max(float(grad.norm()) for grad in given.values())  # of what is zero but for rounding
    for name, grad in given.items():
        error, norm = np.linalg.norm(exported[name] - grad.numpy()), float(grad.norm())
        assert error <= largest * norm + floor, f"{name}: {error:.2e} of {norm:.2e}"
