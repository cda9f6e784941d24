"""Layouts and logical names."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vgjax import layouts, sharding
from vgjax.errors import UserError


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
    with pytest.raises(UserError, match="does not fit 8 devices"):
        layouts.Layout(data=3, fsdp=-1).mesh(jax.devices())


def test_shard_is_the_identity_without_a_layout_and_constrains_with_one():
    x = jnp.ones((8, 4))
    assert sharding.shard(x, "batch", None) is x
    layout, mesh = layouts.find("dp", 8)
    with sharding.use(layout, mesh):
        y = jax.jit(lambda x: sharding.shard(x, "batch", None) * 2)(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("data", None)), 2)


def test_batches_are_split_and_replicas_are_whole():
    layout, mesh = layouts.find("dp", 8)
    batch = sharding.place({"x": jnp.arange(16.0), "odd": jnp.ones((3, 2))}, layout, mesh)
    assert batch["x"].addressable_shards[0].data.shape == (2,)
    assert batch["odd"].sharding.is_fully_replicated
    assert sharding.replicate(jnp.ones(3), mesh).sharding.is_fully_replicated
