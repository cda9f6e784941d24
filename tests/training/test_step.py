"""The train step: sharded like its state, right under accumulation, and a bad step is dropped whole."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from vgjax.errors import UserError
from vgjax.losses.mean import pair
from vgjax.parallel import layouts, sharding
from vgjax.training import state, step
from vgjax.training.checkpoint import Checkpoints, digest
from vgjax.training.optimizers import adamw, decay_mask, hidden_matrices, muon, schedule
from vgjax.training.players import Player, alike

WIDTH, BATCH = 16, 8


@dataclasses.dataclass(frozen=True)
class Regression:
    """Two players, each a linear model on `x`; sample noise comes from the key and the sample's index."""

    players: ClassVar[tuple[str, ...]] = ("first", "second")

    def init(self, key, batch):
        names = sharding.named(nn.initializers.normal(), "embed", "mlp")
        bias = sharding.named(nn.initializers.zeros, "mlp")
        return {player: {"kernel": names(key, (WIDTH, 2)), "bias": bias(key, (2,))} for player in self.players}

    def prepare(self, frozen, batch):
        return batch | {"x": batch["x"] * frozen["scale"]}

    def loss(self, player, params, batch, key):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["index"])
        noise = jax.vmap(lambda k: jax.random.normal(k, (2,)))(keys)
        out = batch["x"] @ params[player]["kernel"] + params[player]["bias"]
        errors = jnp.square(out - batch["y"] - noise).mean(-1)
        return errors.mean(), {f"loss/{player}": pair(errors)}


def batch_of(number: int, bad: int | None = None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    x = rng.normal(size=(BATCH, WIDTH)).astype(np.float32)
    if bad is not None:
        x[bad, 0] = np.nan
    index = np.arange(number * BATCH, (number + 1) * BATCH, dtype=np.uint32)
    return {"x": x, "y": x[:, :2] * 2, "index": index}


def trained(kind: str = "dp", devices: int = 1, batches=None, accumulate=1, players=None, **how):
    objective, optimizer = Regression(), adamw(schedule("constant", 0.01, 0, 100), weight_decay=0.1)
    players = players or alike(objective.players, optimizer, **how)
    layout, mesh = layouts.find(kind, devices)
    frozen = {"scale": jnp.float32(1.5)}
    batches = [batch_of(i) for i in range(3)] if batches is None else batches
    with sharding.use(layout, mesh):
        example = jax.eval_shape(objective.prepare, frozen, batch_of(0))
        abstract, init = state.builder(objective, players, 7, example, layout, mesh)
        now, run = init(), step.make(objective, players, abstract, accumulate)
        history = [jax.device_get(now)]
        for batch in batches:
            now, metrics = run(now, sharding.replicate(frozen, mesh), sharding.place(batch, layout, mesh))
            history.append(jax.device_get(now))
    return now, abstract, history, jax.device_get(metrics)


def close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-6), a, b)


@pytest.mark.parametrize("kind,devices", [("dp", 4), ("fsdp", 8)])
def test_many_devices_are_the_same_run_as_one(kind, devices):
    one = trained()[2][-1]
    many = trained(kind, devices)[2][-1]
    close((one.params, one.opt, one.ema), (many.params, many.opt, many.ema))


def test_moments_and_ema_live_where_their_parameters_live():
    now, abstract, _, _ = trained("fsdp", 8)
    kernel = now.params["first"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (WIDTH // 8, 2)
    moments = [leaf for leaf in jax.tree.leaves(now.opt["first"]) if leaf.shape == kernel.shape]
    assert len(moments) == 2
    for leaf in (*moments, now.ema["first"]["kernel"]):
        assert leaf.sharding.is_equivalent_to(kernel.sharding, 2)
    jax.tree.map(lambda leaf, a: leaf.sharding.is_equivalent_to(a.sharding, leaf.ndim) or pytest.fail(), now, abstract)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_is_the_whole_batch(accumulate):
    whole, parts = trained()[2][-1], trained(accumulate=accumulate)[2][-1]
    close((whole.params, whole.ema), (parts.params, parts.ema))


@pytest.mark.parametrize("bad", [0, 5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_with_one_nan_sample_is_dropped_whole_and_counted(bad, accumulate):
    batches = [batch_of(0), batch_of(1, bad), batch_of(2, bad), batch_of(3)]
    _, _, history, metrics = trained(batches=batches, accumulate=accumulate)
    for after in (history[2], history[3]):
        for part in ("params", "opt", "ema"):
            jax.tree.map(np.testing.assert_array_equal, getattr(history[1], part), getattr(after, part))
    assert [h.dropped.tolist() for h in history] == [[0, 0], [0, 0], [1, 1], [2, 2], [0, 2]]
    assert [int(h.step) for h in history] == [0, 1, 2, 3, 4]
    assert np.isfinite(history[4].params["first"]["kernel"]).all()
    assert metrics["dropped"].tolist() == [0, 1]


def test_a_finite_loss_with_an_infinite_gradient_is_dropped():
    @dataclasses.dataclass(frozen=True)
    class Cliff(Regression):
        def loss(self, player, params, batch, key):
            loss = jnp.sqrt(jnp.abs(params[player]["bias"]).sum())  # finite at 0, its slope is not
            return loss, {f"loss/{player}": pair(loss)}

    objective = Cliff()
    players = alike(objective.players, optax.sgd(0.1))
    layout, mesh = layouts.find("dp", 1)
    with sharding.use(layout, mesh):
        abstract, init = state.builder(objective, players, 0, batch_of(0), layout, mesh)
        now, _ = step.make(objective, players, abstract)(init(), {"scale": 1.0}, batch_of(0))
    assert now.dropped.tolist() == [1, 1]
    assert np.isfinite(np.asarray(now.params["first"]["bias"])).all()


def test_clip_bounds_the_norm_of_the_update():
    def moved(clip):
        objective = Regression()
        players = alike(objective.players, optax.sgd(1.0), clip=clip)
        layout, mesh = layouts.find("dp", 1)
        with sharding.use(layout, mesh):
            abstract, init = state.builder(objective, players, 0, batch_of(0), layout, mesh)
            before = jax.device_get(init().params)
            run = step.make(objective, players, abstract)
            after = jax.device_get(run(init(), {"scale": jnp.float32(1.0)}, batch_of(0))[0].params)
        return float(optax.global_norm(jax.tree.map(jnp.subtract, after["first"], before["first"])))

    assert moved(0.0) > 0.5
    assert moved(0.1) == pytest.approx(0.1, rel=1e-3)


def test_ema_follows_the_parameters_with_its_warmed_up_decay():
    _, _, history, _ = trained(ema=0.999)
    average = history[0].ema["first"]["kernel"]
    for i in range(3):
        decay = min(0.999, (1 + i) / (10 + i))
        average = decay * average + (1 - decay) * history[i + 1].params["first"]["kernel"]
    np.testing.assert_allclose(history[3].ema["first"]["kernel"], average, rtol=1e-5)


def test_only_kernels_decay_also_when_layers_are_stacked():
    params = {"layers": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4)), "scale": jnp.ones((3, 4))}}
    assert decay_mask(params) == {"layers": {"kernel": True, "bias": False, "scale": False}}


def test_schedules_warm_up_and_end_where_they_say():
    for kind, end in (("constant", 1.0), ("cosine", 0.1), ("linear", 0.1)):
        rate = schedule(kind, 1.0, 10, 100, final=0.1)
        assert float(rate(0)) == 0.0
        assert float(rate(10)) == pytest.approx(1.0)
        assert float(rate(100)) == pytest.approx(end, abs=1e-6)


def test_muon_takes_the_matrices_of_blocks_alone_and_its_updates_are_orthogonal():
    rng = np.random.default_rng(0)
    shapes = {
        ("block", "qkv", "kernel"): (2, 3, 8, 2, 4),
        ("block", "merge", "kernel"): (2, 2, 4, 8),
        ("block_0", "conv_1", "kernel"): (3, 3, 3, 4, 8),
        ("block", "qkv", "bias"): (2, 3, 2, 4),
        ("velocity", "kernel"): (8, 8),
    }
    params: dict = {}
    for path, shape in shapes.items():
        at = params
        for name in path[:-1]:
            at = at.setdefault(name, {})
        at[path[-1]] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    dims = hidden_matrices(params)
    assert dims["block"]["qkv"]["kernel"].reduction_axis == (2,) and dims["block"]["qkv"]["kernel"].output_axis == (
        3,
        4,
    )
    assert dims["block"]["merge"]["kernel"].reduction_axis == (1, 2)
    assert dims["block_0"]["conv_1"]["kernel"].reduction_axis == (0, 1, 2, 3)
    assert dims["block"]["qkv"]["bias"] is None and dims["velocity"]["kernel"] is None
    tx = muon(lambda count: 1.0)
    updates, _ = tx.update(params, tx.init(params), params)
    update = np.asarray(updates["block"]["qkv"]["kernel"]).reshape(6, 8, 8)
    for matrix in update:  # equal singular values, as far as five Newton-Schulz iterations take them
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values[0] / values[-2] < 2.5  # the smallest may start too near 0 for five iterations


def test_moments_of_an_optimizer_that_takes_some_parameters_are_sharded_too():
    objective = Regression()
    players = alike(objective.players, muon(lambda count: 0.01))
    layout, mesh = layouts.find("fsdp", 8)
    with sharding.use(layout, mesh):
        abstract, init = state.builder(objective, players, 0, batch_of(0), layout, mesh)
        now = init()
    large = [leaf for leaf in jax.tree.leaves(now.opt) if leaf.shape == (WIDTH, 2)]
    assert large and all(leaf.addressable_shards[0].data.shape == (WIDTH // 8, 2) for leaf in large)


def test_the_old_state_is_given_away_so_that_two_never_lie_in_memory():
    objective = Regression()
    players = alike(objective.players, adamw(schedule("constant", 0.01, 0, 100)))
    layout, mesh = layouts.find("fsdp", 8)
    frozen = {"scale": jnp.float32(1.5)}
    with sharding.use(layout, mesh):
        example = jax.eval_shape(objective.prepare, frozen, batch_of(0))
        abstract, init = state.builder(objective, players, 7, example, layout, mesh)
        old, run = init(), step.make(objective, players, abstract)
        run(old, sharding.replicate(frozen, mesh), sharding.place(batch_of(0), layout, mesh))
    kept = [leaf for leaf in jax.tree.leaves(old) if not leaf.is_deleted()]
    assert not [leaf.shape for leaf in kept if leaf.size > 1]


def two(**second) -> tuple[Player, ...]:
    """A player that learns by SGD at every step, and one of another optimizer and cadence."""
    return Player("first", optax.sgd(0.05), ema=0.5), Player("second", optax.adam(0.01), ema=0.9, **second)


def moves(history, name: str) -> list[bool]:
    """At which steps the parameters of a player changed."""
    kernels = [h.params[name]["kernel"] for h in history]
    return [bool(np.any(a != b)) for a, b in zip(kernels, kernels[1:], strict=False)]


def test_each_player_learns_at_its_own_steps_by_its_own_optimizer_and_average():
    players = two(every=2, starts=1)
    batches = [batch_of(i) for i in range(6)]
    _, _, history, metrics = trained(batches=batches, players=players)
    assert moves(history, "first") == [True] * 6
    assert moves(history, "second") == [False, True, False, True, False, True]
    assert [int(h.opt["second"][0].count) for h in history] == [0, 0, 1, 1, 2, 2, 3] and players[1].updates(6) == 3
    average = history[1].ema["second"]["kernel"]
    for update, step_ in enumerate((2, 4, 6)):
        decay = min(0.9, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * history[step_].params["second"]["kernel"]
    np.testing.assert_allclose(history[6].ema["second"]["kernel"], average, rtol=1e-5)
    assert metrics["norm/second"][1] == 1 and metrics["dropped"].tolist() == [0, 1]
    _, _, _, early = trained(batches=batches[:1], players=players)
    assert early["norm/second"].tolist() == [0, 0] and early["loss/second"].tolist() == [0, 0]


def test_players_of_other_cadences_are_on_eight_devices_what_they_are_on_one():
    batches = [batch_of(i) for i in range(4)]
    one = trained(batches=batches, players=two(every=2))[2][-1]
    many = trained("fsdp", 8, batches=batches, players=two(every=2))[2][-1]
    close((one.params, one.opt, one.ema), (many.params, many.opt, many.ema))


def test_two_players_go_on_from_a_checkpoint_as_if_they_had_not_stopped(tmp_path):
    batches = [batch_of(i) for i in range(5)]
    layout, mesh = layouts.find("dp", 1)
    objective, players, frozen = Regression(), two(every=2, starts=1), {"scale": jnp.float32(1.5)}
    with sharding.use(layout, mesh), Checkpoints(tmp_path) as kept:
        example = jax.eval_shape(objective.prepare, frozen, batch_of(0))
        abstract, init = state.builder(objective, players, 7, example, layout, mesh)
        run, now = step.make(objective, players, abstract), init()
        for number, batch in enumerate(batches):
            now, _ = run(now, frozen, batch)
            if number == 2:
                kept.save(3, now, {}, wait=True)
        again, _, _ = kept.restore(abstract)
        for batch in batches[3:]:
            again, _ = run(again, frozen, batch)
    assert digest(again) == digest(now)


@pytest.mark.parametrize("wrong", [dict(every=0), dict(starts=-1), dict(ema=1.0), dict(clip=-1.0)])
def test_a_player_without_sense_is_refused(wrong):
    with pytest.raises(UserError, match="the player critic needs clip >= 0"):
        Player("critic", optax.sgd(0.1), **wrong)
