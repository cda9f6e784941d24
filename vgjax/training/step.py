"""The jitted train step: players, accumulation, clip, finite check, EMA, metrics; the state is donated.

A step whose loss or gradient norm is not finite is dropped whole: parameters, moments and EMA keep every bit, and only
the step number and the two counters of dropped steps move on. Multiplying an update by zero instead would not do, since
0 * NaN is NaN.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from vgjax.losses.mean import pair
from vgjax.training.players import Player
from vgjax.training.state import TrainState, key_of
from vgjax.typing import Array, Float, Key, Learnable, Params, PyTree

Learned = tuple[Params, PyTree, Params]  # a player's parameters, optimizer state and average
Step = Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, Array]]]


def make(objective: Learnable, players: Sequence[Player], abstract: TrainState, accumulate: int = 1) -> Step:
    """The compiled `step(state, frozen, batch) -> (state, metrics)`.

    `batch` comes raw from the loader, with its leading dim divisible by `accumulate`; `frozen` are parameters that no
    one trains (a VAE under a flow). The players learn in turn, each from what those before it have become. Metrics are
    pairs (sum, count); those of a player that does not learn at a step count nothing.
    """

    def train_step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
        key = jax.random.fold_in(key_of(state.seed), state.step)
        batch = objective.prepare(frozen, batch)
        params, opt, averaged = dict(state.params), dict(state.opt), dict(state.ema)
        metrics, good = {}, jnp.asarray(True)
        for player in players:
            name = player.name

            def learn(own: Learned, player: Player = player) -> tuple[Learned, tuple[dict[str, Array], Array]]:
                everyone = {**frozen, **params}
                return _learn(objective, player, own, everyone, batch, key, accumulate, state.step, abstract)

            own = params[name], opt[name], averaged[name]
            own, (seen, fine) = learn(own) if player.always else _at_its_turn(player, learn, own, state.step)
            params[name], opt[name], averaged[name] = own
            metrics, good = metrics | seen, good & fine
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


def _learn(
    objective: Learnable,
    player: Player,
    own: Learned,
    everyone: Params,
    batch: PyTree,
    key: Key,
    accumulate: int,
    step: Array,
    abstract: TrainState,
) -> tuple[Learned, tuple[dict[str, Array], Array]]:
    """(what a player becomes, (its metrics, whether loss and gradient norm are finite))."""
    params, opt, average = own
    loss, grads, seen = _gradients(objective, player.name, everyone, batch, key, accumulate)
    grads = jax.tree.map(_as_placed, grads, abstract.params[player.name])
    norm = optax.global_norm(grads)
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    scale = jnp.minimum(1.0, player.clip / (norm + 1e-6)) if player.clip else 1.0
    grads = jax.tree.map(lambda g, s=scale: g * s, grads)
    updates, opt = player.optimizer.update(grads, opt, params)
    params = optax.apply_updates(params, updates)
    before = step if player.always else (step - player.starts) // player.every  # its own updates
    decay = jnp.minimum(player.ema, (1.0 + before) / (10.0 + before))
    average = jax.tree.map(lambda old, new: old + (1.0 - decay) * (new - old), average, params)
    return (params, opt, average), (seen | {f"norm/{player.name}": pair(norm)}, good)


def _at_its_turn(
    player: Player, learn: Callable[..., PyTree], own: Learned, step: Array
) -> tuple[Learned, tuple[dict[str, Array], Array]]:
    """`learn` at the player's steps; at the others nothing is computed, and its metrics count nothing."""
    _, (seen, _) = jax.eval_shape(learn, own)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), seen)
    due = (step >= player.starts) & ((step - player.starts) % player.every == 0)
    return jax.lax.cond(due, learn, lambda own: (own, (nothing, jnp.asarray(True))), own)


def _gradients(
    objective: Learnable, player: str, params: Params, batch: PyTree, key: Key, accumulate: int
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
