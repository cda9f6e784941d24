"""The jitted train step: players, accumulation, clip, finite check, EMA, metrics; the state is donated.

A step whose loss or gradient norm is not finite is dropped whole: parameters, moments and EMA keep every bit, and only
the step number and the two counters of dropped steps move on. Multiplying an update by zero instead would not do, since
0 * NaN is NaN.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from vgjax.losses.mean import pair
from vgjax.training.state import TrainState, key_of
from vgjax.typing import Array, Float, Key, Params, PyTree

Step = Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Array]]]


def make(
    objective: Any,
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    clip: float = 1.0,
    ema: float = 0.999,
    accumulate: int = 1,
) -> Step:
    """The compiled `step(state, frozen, batch) -> (state, metrics)`.

    `batch` comes raw from the loader, with its leading dim divisible by `accumulate`; `frozen` are parameters that no
    one trains (a VAE under a flow). Metrics are pairs (sum, count). `clip` bounds the global gradient norm of each
    player (0: no bound); the EMA decay warms up as `(1 + step) / (10 + step)`.
    """

    def train_step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key_of(state.seed), state.step)
        batch = objective.prepare(frozen, batch)
        params, opt, metrics, good = dict(state.params), dict(state.opt), {}, jnp.asarray(True)
        for player in objective.players:
            loss, grads, seen = _gradients(objective, player, {**frozen, **params}, batch, key, accumulate)
            grads = jax.tree.map(_as_placed, grads, abstract.params[player])
            norm = optax.global_norm(grads)
            good = good & jnp.isfinite(loss) & jnp.isfinite(norm)
            scale = jnp.minimum(1.0, clip / (norm + 1e-6)) if clip else 1.0
            grads = jax.tree.map(lambda g, s=scale: g * s, grads)
            updates, opt[player] = optimizer.update(grads, opt[player], params[player])
            params[player] = optax.apply_updates(params[player], updates)
            metrics |= seen | {f"norm/{player}": pair(norm)}
        decay = jnp.minimum(ema, (1.0 + state.step) / (10.0 + state.step))
        averaged = jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), state.ema, params)
        params, opt, averaged = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (params, opt, averaged), (state.params, state.opt, state.ema)
        )
        bad = 1 - good.astype(jnp.int32)
        dropped = jnp.stack([(state.dropped[0] + 1) * bad, state.dropped[1] + bad])
        metrics = jax.tree.map(lambda m: jnp.where(good, m, jnp.zeros_like(m)), metrics)
        metrics |= {"dropped": pair(bad), "dropped_in_a_row": pair(dropped[0])}
        return state.replace(step=state.step + 1, params=params, opt=opt, ema=averaged, dropped=dropped), metrics

    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(train_step, donate_argnums=0, in_shardings=(placed, None, None), out_shardings=(placed, None))


def _gradients(
    objective: Any, player: str, params: Params, batch: PyTree, key: Key, accumulate: int
) -> tuple[Float[Array, ""], Params, dict[str, Array]]:
    """Mean loss, its gradient and summed metrics over `accumulate` equal micro-batches."""

    def loss_of(own: Params, micro: PyTree) -> tuple[Array, dict[str, Array]]:
        return objective.loss(player, {**params, player: own}, micro, key)

    both = jax.value_and_grad(loss_of, has_aux=True)
    if accumulate == 1:
        (loss, metrics), grads = both(params[player], batch)
        return loss, grads, metrics

    def body(carry: PyTree, micro: PyTree) -> tuple[PyTree, None]:
        (loss, metrics), grads = both(params[player], micro)
        share = (loss / accumulate, jax.tree.map(lambda g: g / accumulate, grads), metrics)
        return jax.tree.map(jnp.add, carry, share), None

    # Every device keeps its own rows in each micro-batch; the rows' keys come from their index, so order is free.
    micros = jax.tree.map(lambda leaf: rearrange(leaf, "(b a) ... -> a b ...", a=accumulate), batch)
    shapes = jax.eval_shape(both, params[player], jax.tree.map(lambda leaf: leaf[0], micros))
    (loss, metrics), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (loss, grads, metrics), _ = jax.lax.scan(body, (loss, grads, metrics), micros)
    return loss, grads, metrics


def _as_placed(grad: Array, abstract: jax.ShapeDtypeStruct) -> Array:
    """The gradient where its parameter lives: left alone, the compiler would choose."""
    return jax.lax.with_sharding_constraint(grad, abstract.sharding)
