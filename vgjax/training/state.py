"""The training state: abstract first, then born sharded.

Every leaf is a plain array, so a checkpoint is the state and nothing else; the random key is its seed, since each
step's randomness is `fold_in(seed, step)`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vgjax.parallel import sharding
from vgjax.training.players import Player
from vgjax.typing import Array, Key, Learnable, Params, PyTree


class TrainState(struct.PyTreeNode):
    """Everything that a step changes. `params`, `opt` and `ema` are dicts by player, fp32, sharded alike.

    The same structure holds arrays, their abstract shapes or their shardings.
    """

    step: PyTree  # int32
    params: Params
    opt: PyTree
    ema: Params
    dropped: PyTree  # int32 of 2: non-finite steps in a row up to now, and in all
    seed: PyTree  # int32; uint32 of 2, the high word first, where 31 bits do not hold it


def key_of(seed: Array) -> Key:
    """The random key of a state's `seed`."""
    return jax.random.wrap_key_data(seed, impl="threefry2x32") if seed.ndim else jax.random.key(seed)


def _leaf(seed: int) -> Array:
    """A seed in [0, 2^64) as a state holds it."""
    if seed < 2**31:
        return jnp.asarray(seed, jnp.int32)
    return jnp.asarray(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))


def builder(
    objective: Learnable, players: Sequence[Player], seed: int, example: PyTree, layout: sharding.Specs, mesh: Mesh
) -> tuple[TrainState, Callable[..., TrainState]]:
    """(abstract state with shardings, function that makes the initial state born with them, of parameters if given).

    `example` is a prepared batch, concrete or abstract: the objective initialises its players on its shapes.
    """

    def boxed() -> Params:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), example)
        return objective.init(key_of(_leaf(seed)), zeros)

    def init(given: Params | None = None) -> TrainState:
        params = sharding.unboxed(boxed()) if given is None else given
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt={player.name: player.optimizer.init(params[player.name]) for player in players},
            ema=jax.tree.map(jnp.copy, params),
            dropped=jnp.zeros((2,), jnp.int32),
            seed=_leaf(seed),
        )

    boxes = jax.eval_shape(boxed)
    shapes = jax.eval_shape(init, sharding.unboxed(boxes))  # the model is traced once
    everywhere = NamedSharding(mesh, PartitionSpec())
    of_params = sharding.shardings(boxes, layout, mesh)
    of_opt = {one.name: _like(shapes.params[one.name], of_params[one.name], shapes.opt[one.name]) for one in players}
    of_opt = jax.tree.map(lambda found: found or everywhere, of_opt, is_leaf=lambda found: found is None)
    specs = TrainState(everywhere, of_params, of_opt, of_params, everywhere, everywhere)
    abstract = jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, specs)
    return abstract, jax.jit(init, out_shardings=specs)


def _like(params: Params, of_params: PyTree, opt: PyTree) -> PyTree:
    """For each leaf of an optimizer's state the sharding of the parameter it belongs to, or None.

    jit(optimizer.init) would replicate the moments. A moment belongs to the parameter whose path ends its own, with the
    same shape: unlike `optax.tree_map_params` that also holds where an optimizer takes only some of the parameters.
    """
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(of_params), strict=True)
    known = {(path, leaf.shape): sharding for (path, leaf), sharding in leaves}

    def one(path: tuple, leaf: PyTree) -> NamedSharding | None:
        tails = (known.get((path[start:], leaf.shape)) for start in range(len(path)))
        return next((sharding for sharding in tails if sharding is not None), None)

    return jax.tree_util.tree_map_with_path(one, opt)


def parameter_count(params: Params) -> int:
    """Number of parameters of a concrete or abstract tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
