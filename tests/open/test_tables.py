"""Weight tables are permutations: both directions agree bit by bit, and whatever does not fit is said."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec

from vgjax.errors import UserError
from vgjax.nn.rope import interleaved
from vgjax.open import tables
from vgjax.open.tables import Joined, Part
from vgjax.parallel import layouts

TREE = {
    "blocks": {
        "qkv": {"kernel": jax.ShapeDtypeStruct((3, 2, 4, 2, 6), jnp.float32)},
        "out": {"kernel": jax.ShapeDtypeStruct((3, 2, 6, 8), jnp.float32)},
        "up": {"kernel": jax.ShapeDtypeStruct((3, 5, 8), jnp.float32)},
    },
    "norm": {"scale": jax.ShapeDtypeStruct((6,), jnp.float32)},
}
TABLE = {
    "layer.{}.q.weight": Part("blocks/qkv/kernel", "d h k -> (h k) d", 0, ("k", interleaved)),
    "layer.{}.v.weight": Part("blocks/qkv/kernel", "d h k -> (h k) d", 1),
    "layer.{}.out.weight": Joined(
        (Part("blocks/out/kernel", "h k d -> d (h k)"), Part("blocks/up/kernel", "i d -> d i")), 1
    ),
    "norm.weight": Part("norm/scale", "(s e) -> (s e)", order=("s", lambda n: np.arange(n)[::-1]), sizes=(("s", 2),)),
}


@pytest.fixture(scope="module")
def tensors():
    random = np.random.default_rng(0)
    shapes = {entry.name: entry.shape for entry in tables.entries(TABLE, TREE)}
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def described(tensors):
    return {name: (tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()}


def test_every_tensor_has_its_place(tensors):
    params = tables.load(TABLE, TREE, tensors.__getitem__)
    q = tensors["layer.1.q.weight"].reshape(2, 6, 4)[:, [0, 2, 4, 1, 3, 5]]  # halves, where theirs are pairs
    np.testing.assert_array_equal(params["blocks"]["qkv"]["kernel"][1, 0], q.transpose(2, 0, 1))
    np.testing.assert_array_equal(params["blocks"]["up"]["kernel"][2], tensors["layer.2.out.weight"][:, 12:].T)
    np.testing.assert_array_equal(params["norm"]["scale"], np.roll(tensors["norm.weight"], 3))


@pytest.mark.parametrize("dims", ["a b c d", "d c b a", "b d a c", "a c d b", "c a b d"])
@pytest.mark.parametrize("shape", [(5, 40, 7, 33), (1, 70, 1, 2), (3, 1, 1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("types", [("float32", "float32"), ("bfloat16", "bfloat16"), ("float32", "bfloat16")])
def test_a_copy_in_strips_is_the_copy(dims, shape, types):
    of, to = map(jnp.dtype, types)
    x = np.random.default_rng(0).standard_normal(shape).astype(of)
    for part in (x, x[:, :, :, : -(-shape[3] // 2)]):
        turned = rearrange(part, f"a b c d -> {dims}")
        made = tables.copied(np.empty(turned.shape, to), turned)
        assert made.tobytes() == turned.astype(to).tobytes()


def test_leaves_come_one_by_one_and_are_let_go(tensors):
    asked = []
    leaves = tables.leaves(TABLE, TREE, lambda name: asked.append(name) or tensors[name])
    path, leaf = next(leaves)
    assert path == "blocks/out/kernel" and asked == [f"layer.{i}.out.weight" for i in range(3)]
    gone = weakref.ref(leaf)
    del leaf
    next(leaves)
    assert gone() is None


def test_export_of_an_abstract_tree_reads_a_leaf_once_and_lets_it_go(tensors):
    params, asked = tables.flat(tables.load(TABLE, TREE, tensors.__getitem__)), []
    exported = dict(tables.export(TABLE, TREE, lambda path: asked.append(path) or params[path]))
    assert sorted(asked) == sorted(params)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(exported[name], tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_gives_back_every_bit(tensors, dtype):
    given = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    kinds = tables.dtypes(TABLE, TREE, described(given))
    assert set(kinds.values()) == {jnp.dtype(dtype)}
    wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), TREE)
    back = dict(tables.export(TABLE, tables.load(TABLE, wanted, given.__getitem__)))
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert back[name].dtype == tensor.dtype and back[name].tobytes() == tensor.tobytes()


def test_tensors_go_straight_to_their_shards(tensors):
    layout = layouts.named("fsdp")
    mesh = layout.mesh(jax.devices())
    specs = {"kernel": PartitionSpec(None, None, None, None, None), "up": PartitionSpec(None, None, "fsdp")}

    def placed(path, leaf):
        spec = specs["up"] if leaf.shape == (3, 5, 8) else PartitionSpec()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    wanted = jax.tree_util.tree_map_with_path(placed, TREE)
    params = tables.load(TABLE, wanted, tensors.__getitem__)
    alone = tables.load(TABLE, TREE, tensors.__getitem__)
    for ours, one, want in zip(*map(jax.tree.leaves, (params, alone, wanted)), strict=True):
        assert ours.sharding.is_equivalent_to(want.sharding, ours.ndim)
        np.testing.assert_array_equal(ours, one)
    assert params["blocks"]["up"]["kernel"].addressable_shards[0].data.shape == (3, 5, 1)


def test_a_leaf_that_is_filled_twice_or_not_wholly_is_told():
    assert not tables.uncovered(TABLE, TREE)
    less = {name: held for name, held in TABLE.items() if name != "layer.{}.v.weight"}
    assert ["qkv" in said for said in tables.uncovered(less, TREE)] == [True]
    twice = TABLE | {"again.weight": Part("norm/scale")}
    assert ["norm/scale" in said for said in tables.uncovered(twice, TREE)] == [True]
    with pytest.raises(AssertionError, match="names nowhere"):
        tables.uncovered({"x": Part("nowhere")}, TREE)


def test_all_that_does_not_fit_is_said_together(tensors):
    given = described(tensors)
    assert tables.mismatches(TABLE, TREE, given) == []
    del given["layer.0.q.weight"]
    given |= {"norm.weight": ((7,), "float32"), "layer.1.v.weight": ((12, 4), "I8"), "stray.x": ((1,), "float32")}
    said = tables.mismatches(TABLE, TREE, given)
    assert len(said) == 4
    for sentence in (
        "layer.0.q.weight is missing, of shape (12, 4)",
        "norm.weight has shape (7,), the model needs (6,)",
        "layer.1.v.weight is of type I8",
        "stray.x of shape (1,) is not a tensor",
    ):
        assert any(sentence in one for one in said), said
    assert len(tables.mismatches(TABLE, TREE, given, ignored=("stray.",))) == 3


def test_types_that_differ_in_one_leaf_are_named(tensors):
    given = described(tensors) | {"layer.1.v.weight": ((12, 4), "bfloat16")}
    with pytest.raises(UserError, match=r"blocks/qkv/kernel.*layer.1.v.weight is bfloat16; give one with --dtype"):
        tables.dtypes(TABLE, TREE, given)
