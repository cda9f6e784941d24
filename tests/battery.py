"""The questions that every model answers; a model's own test file asks them about a tiny instance.

`inputs` are the positional arguments of `apply`, arrays or ShapeDtypeStructs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from vgjax.parallel.sharding import Named, unboxed
from vgjax.typing import PyTree


def shapes(model, *inputs) -> tuple[PyTree, PyTree]:
    """Abstract parameters and outputs: nothing is computed, so the largest size answers at once."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return boxed["params"], jax.eval_shape(model.apply, unboxed(boxed), *inputs)


def count(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def every_leaf_has_names(params: PyTree) -> None:
    """Each parameter says what each of its dims is; a dim may be None, a parameter may not be without a box."""
    for path, leaf in traverse_util.flatten_dict(params).items():
        assert isinstance(leaf, Named), f"{'/'.join(path)} has no names"
        assert len(leaf.names) == leaf.value.ndim, f"{'/'.join(path)}: {leaf.names} for {leaf.value.shape}"


def perturbed(model, *inputs, std: float = 0.2) -> PyTree:
    """Parameters away from their zero initialisations, as training leaves them: normal, scales around 1."""
    return perturbed_like(unboxed(shapes(model, *inputs)[0]), std)


def perturbed_like(abstract: PyTree, std: float = 0.2) -> PyTree:
    generator = np.random.default_rng(1)
    values = {
        path: jnp.asarray((path[-1] == "scale") + std * generator.standard_normal(leaf.shape), leaf.dtype)
        for path, leaf in traverse_util.flatten_dict(abstract).items()
    }
    return traverse_util.unflatten_dict(values)


def loss_and_gradients(model, params: PyTree, *inputs) -> tuple[jax.Array, PyTree]:
    """A loss that every output element touches with a weight of its own."""

    def loss(params):
        outputs = jax.tree.leaves(model.apply({"params": params}, *inputs))
        return sum(jnp.mean(jnp.square(o - jnp.sin(jnp.arange(o.size).reshape(o.shape)))) for o in outputs)

    return jax.jit(jax.value_and_grad(loss))(params)


def gradients_are_finite_and_none_is_zero(gradients: PyTree) -> None:
    for path, leaf in traverse_util.flatten_dict(gradients).items():
        assert jnp.all(jnp.isfinite(leaf)), f"gradient of {'/'.join(path)} is not finite"
        assert jnp.any(leaf != 0), f"gradient of {'/'.join(path)} is zero"


def agrees(left: PyTree, right: PyTree, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), left, right)


def bf16_is_near_fp32(model, params: PyTree, *inputs, distance: float = 0.05) -> None:
    """Relative distance of all outputs together; bf16 keeps 8 bits, a block or two loses one more."""
    single = jax.tree.leaves(jax.jit(model.apply)({"params": params}, *inputs))
    half = jax.tree.leaves(jax.jit(model.clone(dtype=jnp.bfloat16).apply)({"params": params}, *inputs))
    for a, b in zip(single, half, strict=True):
        error = jnp.linalg.norm(a - b.astype(jnp.float32)) / jnp.linalg.norm(a)
        assert 0 < error < distance, f"bf16 is {float(error):.3f} away from fp32"


def a_stream_in_fp32_keeps_deep_models_exact(model, *inputs) -> None:
    """Rounded to bf16 at every block, the stream's own error is most of a deep model's."""
    params = perturbed(model, *inputs)
    exact = jax.jit(model.apply)({"params": params}, *inputs)

    def error(stream):
        half = model.clone(dtype=jnp.bfloat16, stream=stream)
        return jnp.linalg.norm(jax.jit(half.apply)({"params": params}, *inputs) - exact) / jnp.linalg.norm(exact)

    assert error(jnp.float32) < 0.75 * error(jnp.bfloat16)


def value_and_gradients(attention, q, k, v) -> tuple[jax.Array, ...]:
    """(o, dq, dk, dv) of an attention under one random cotangent."""
    target = jax.random.normal(jax.random.key(9), q.shape)
    o, back = jax.vjp(attention, q, k, v)
    return o, *back(target)


def naive_attention(q, k, v, segments=None) -> jax.Array:
    """The formula as it stands in the paper, without care for overflow; a query that sees no key gets 0."""
    seen = jnp.ones((q.shape[0], 1, q.shape[1], k.shape[1]))
    if segments is not None:
        seen = (segments.q[:, None, :, None] == segments.kv[:, None, None, :]) * (segments.kv > 0)[:, None, None, :]
    weights = jnp.exp(jnp.einsum("bnhk,bmhk->bhnm", q, k) / q.shape[-1] ** 0.5) * seen
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.einsum("bhnm,bmhk->bnhk", weights / jnp.where(total == 0, 1, total), v)
