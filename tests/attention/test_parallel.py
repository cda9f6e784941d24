"""Attention spread over eight devices equals attention on one, in value and gradient, whatever divides and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import naive_attention, value_and_gradients
from jax.sharding import NamedSharding

from vgjax.attention.full import Full
from vgjax.attention.parallel import Parallel, fill, join, part
from vgjax.attention.segments import Segments
from vgjax.parallel import layouts, sharding

K = 8
CASES = {  # b, n, m, heads, segments
    "all divide": (4, 32, 32, 8, False),
    "nothing divides": (3, 21, 13, 3, False),
    "padded and packed": (2, 19, 19, 6, True),
}
MESHES = {kind: {} for kind in layouts.LAYOUTS} | {
    "ulysses of four": {"sequence": 4},
    "ring of four": {"sequence": 4},
    "usp of two rings": {"sequence": 4, "tensor": 2},
}


def inputs(b, n, m, heads, packed):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (2 * jax.random.normal(key, (b, size, heads, K)) for key, size in zip(keys, (n, m, m), strict=True))
    if not packed:
        return q, k, v, None
    # The second sample has no key of id 2, so that some of its queries see nothing.
    ids = np.stack([np.arange(n) * 4 // n, np.where(np.arange(n) < n // 2, 1, 0)]).astype(np.int32)
    return q, k, v, Segments(jnp.asarray(np.maximum(ids, [[0], [2]]) - [[0], [0]]), jnp.asarray(ids))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MESHES)
def test_every_layout_gives_the_attention_of_one_device(name, case):
    q, k, v, segments = inputs(*CASES[case])
    kind = name.split()[0]
    layout, mesh = layouts.find(kind, 8, **MESHES[name])
    expected = value_and_gradients(lambda q, k, v: naive_attention(q, k, v, segments), q, k, v)
    with sharding.use(layout, mesh):
        attention = jax.jit(lambda q, k, v: layout.attention()(q, k, v, segments))
        for ours, theirs in zip(value_and_gradients(attention, q, k, v), expected, strict=True):
            assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_without_a_layout_the_wrapper_is_what_it_wraps():
    q, k, v, segments = inputs(*CASES["padded and packed"])
    np.testing.assert_array_equal(Parallel(Full())(q, k, v, segments), Full()(q, k, v, segments))


# A ring sends keys and values, in a loop; USP does both, Ulysses over its neighbours.
COLLECTIVES = {
    "dp": {},
    "tp": {},
    "ulysses": {"all-to-all": 4},
    "ring": {"collective-permute": 2},
    "usp": {"all-to-all": 4, "collective-permute": 2},
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_tokens_travel_by_the_collectives_they_should(kind):
    q, k, v, _ = inputs(8, 32, 32, 8, False)
    layout, mesh = layouts.find(kind, 8)
    spec = layout.spec(("batch", "tokens", "heads", None), q.shape, mesh)
    abstract = jax.ShapeDtypeStruct(q.shape, q.dtype, sharding=NamedSharding(mesh, spec))
    with sharding.use(layout, mesh):
        text = jax.jit(layout.attention()).lower(abstract, abstract, abstract).compile().as_text()
    names = ("all-to-all", "collective-permute", "all-gather", "all-reduce", "reduce-scatter")
    found = {name: text.count(f" {name}(") + text.count(f" {name}-start(") for name in names}
    assert {name: count for name, count in found.items() if count} == COLLECTIVES[kind]


@pytest.mark.parametrize("kind", ["dp", "ulysses", "usp"])
def test_streams_join_and_part_without_a_token_that_changes_its_device(kind):
    layout, mesh = layouts.find(kind, 8)
    devices = mesh.size if kind != "dp" else 1
    x, c = jnp.arange(2 * 61 * 3.0).reshape(2, 61, 3), -jnp.arange(2 * 13 * 3.0).reshape(2, 13, 3)

    def both(x, c):
        joined = join(x, c)
        return joined, *part(joined, c.shape[1])

    with sharding.use(layout, mesh):
        x, c = fill(x), fill(c)
        at = NamedSharding(mesh, layout.spec(("batch", "tokens", None), x.shape, mesh))
        x, c = jax.device_put((x, c), at)
        compiled = jax.jit(both, out_shardings=at).lower(x, c).compile()
    assert "all-" not in compiled.as_text() and "permute" not in compiled.as_text()
    joined, *parts = compiled(x, c)
    np.testing.assert_array_equal(parts[0], x)
    np.testing.assert_array_equal(parts[1], c)
    assert x.shape[1] == -(-61 // devices) * devices and c.shape[1] == -(-13 // devices) * devices
    for piece, of_x, of_c in zip(*(np.split(np.asarray(a), devices, axis=1) for a in (joined, x, c)), strict=True):
        np.testing.assert_array_equal(piece, np.concatenate([of_x, of_c], axis=1))
