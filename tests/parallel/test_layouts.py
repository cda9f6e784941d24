"""Layouts and logical names."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vgjax.errors import UserError
from vgjax.parallel import layouts, sharding


def test_specs_use_an_axis_once_and_only_where_it_divides():
    layout, mesh = layouts.find("fsdp", 8)
    assert layout.spec(("embed", "mlp"), (64, 64), mesh) == PartitionSpec("fsdp", None)
    assert layout.spec(("embed", "mlp"), (6, 64), mesh) == PartitionSpec(None, "fsdp")
    assert layout.spec((None, "heads"), (64, 64), mesh) == PartitionSpec(None, None)
    assert layout.spec(("batch", None), (16, 3), mesh) == PartitionSpec("fsdp", None)


def test_meshes_have_the_four_axes_and_say_auto():
    for kind in layouts.LAYOUTS:
        mesh = layouts.find(kind, 4)[1]
        assert mesh.axis_names == ("data", "fsdp", "sequence", "tensor") and mesh.size == 4
        assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_bad_layouts_are_refused_in_words():
    with pytest.raises(UserError, match="asks for more devices than the 8"):
        layouts.find("dp", 9)
    with pytest.raises(UserError, match="use one of"):
        layouts.find("3d")
    with pytest.raises(UserError, match="tensor=3 does not divide the 8 devices left to it: the nearest .* 2 and 4"):
        layouts.find("fsdp_tp", tensor=3)
    with pytest.raises(UserError, match="sequence=8 does not divide the 4 devices left to it: .* 2 and 4"):
        layouts.find("usp", tensor=2, sequence=8)
    with pytest.raises(UserError, match="data=3: the other axes leave 8 devices"):
        layouts.find("dp", data=3)


def test_axes_take_what_the_devices_give_or_what_is_asked():
    sizes = {kind: tuple(layouts.LAYOUTS[kind].shape(8).values()) for kind in layouts.LAYOUTS}
    assert sizes == {
        "dp": (8, 1, 1, 1),
        "fsdp": (1, 8, 1, 1),
        "hsdp": (2, 4, 1, 1),
        "tp": (1, 1, 1, 8),
        "fsdp_tp": (1, 2, 1, 4),
        "ulysses": (1, 1, 8, 1),
        "ring": (1, 1, 8, 1),
        "usp": (1, 1, 2, 4),
    }
    assert layouts.LAYOUTS["usp"].shape(6) == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 2} | {"fsdp": 3}
    assert layouts.LAYOUTS["ulysses"].shape(64, sequence=4)["fsdp"] == 16


def test_every_slice_is_a_replica():
    for kind, layout in layouts.LAYOUTS.items():
        one, four = layout.shape(64), layout.shape(256, slices=4)
        assert four == one | {"data": 4 * one["data"]}, kind
    assert layouts.LAYOUTS["fsdp"].shape(32, slices=2, data=4)["fsdp"] == 8
    with pytest.raises(UserError, match="data=3"):
        layouts.LAYOUTS["fsdp"].shape(32, slices=2, data=3)


def test_the_first_rule_wins_and_a_later_one_fills_what_it_left():
    layout, mesh = layouts.find("fsdp_tp", 8)
    assert layout.spec(("mlp", "embed"), (64, 64), mesh) == PartitionSpec("tensor", "fsdp")
    assert layout.spec((None, "embed", "heads", "head_dim"), (3, 64, 6, 8), mesh) == PartitionSpec(
        None, "fsdp", None, None
    )
    assert layout.spec(("mlp", "embed"), (6, 3), mesh) == PartitionSpec("fsdp", None)
    assert layout.axes("heads", mesh) == ("tensor",) and layout.axes("tokens", mesh) == ()
    layout, mesh = layouts.find("usp", 8)
    assert layout.spec(("batch", "tokens", None), (3, 8, 5), mesh) == PartitionSpec(None, ("sequence", "tensor"), None)
    assert layout.spec(("batch", "tokens", None), (3, 6, 5), mesh) == PartitionSpec(None, "sequence", None)
    assert layout.axes("tokens", mesh) == ("sequence", "tensor")


def test_shard_is_the_identity_without_a_layout_and_constrains_with_one():
    x = jnp.ones((8, 4))
    assert sharding.shard(x, "batch", None) is x
    layout, mesh = layouts.find("dp", 8)
    with sharding.use(layout, mesh):
        y = jax.jit(lambda x: sharding.shard(x, "batch", None) * 2)(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", None)), 2)


def test_a_large_leaf_that_a_layout_cannot_split_is_refused_by_name_and_a_small_one_stays_whole():
    layout, mesh = layouts.find("fsdp", 8)

    def of(*shape):
        return {"block": {"kernel": sharding.Named(jax.ShapeDtypeStruct(shape, jnp.float32), ("embed", "mlp"))}}

    with pytest.raises(UserError, match=r"block/kernel \(2049, 4099\) over fsdp=8, .* embed=2049: 32 MiB"):
        sharding.shardings(of(2049, 4099), layout, mesh)
    sharding.shardings(of(2049, 4096), layout, mesh)
    sharding.shardings(of(9, 7), layout, mesh)
    usp, mesh = layouts.find("usp", 8)  # one of its two axes divides: half a promise is none
    with pytest.raises(UserError, match="over tensor=4"):
        sharding.shardings(of(4098, 4098), usp, mesh)


def test_batches_are_split_and_replicas_are_whole():
    layout, mesh = layouts.find("dp", 8)
    batch = sharding.place({"x": jnp.arange(16.0), "odd": jnp.ones((3, 2))}, layout, mesh)
    assert batch["x"].addressable_shards[0].data.shape == (2,)
    assert batch["odd"].sharding.is_fully_replicated
    assert sharding.replicate(jnp.ones(3), mesh).sharding.is_fully_replicated
