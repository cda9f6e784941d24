"""What is read off a compiled program's text is what the program does."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vgjax.parallel import layouts
from vgjax.planner import hlo


def compiled(function, *arrays, kind="ring"):
    _, mesh = layouts.find(kind, 8)
    spec = PartitionSpec("sequence")
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)) for a in arrays]
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return hlo.parse(jax.jit(mapped).lower(*placed).compile().as_text())


X = jnp.zeros((8, 8, 128), jnp.float32)  # 4096 bytes a device
RING = [(i, (i + 1) % 8) for i in range(8)]
COLLECTIVES = {
    "all-gather": (lambda x: jax.lax.all_gather(x, "sequence").sum(0), 7 * 4096),
    "all-reduce": (lambda x: jax.lax.psum(x, "sequence"), 2 * 4096 * 7 / 8),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "sequence", scatter_dimension=1, tiled=True), 4096 * 7 / 8),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "sequence", 1, 1, tiled=True), 4096 * 7 / 8),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "sequence", RING), 4096),
}


@pytest.mark.parametrize("kind", COLLECTIVES)
def test_a_collective_sends_what_its_ring_algorithm_sends(kind):
    function, sent = COLLECTIVES[kind]
    found = compiled(function, X).collectives()
    assert [(c.kind, c.sent, c.times) for c in found] == [(kind, sent, 1)]
    assert len(found[0].group) == (2 if kind == "collective-permute" else 8)


def test_a_collective_in_a_loop_counts_at_every_turn():
    def turn(x, _):
        return jax.lax.ppermute(x, "sequence", RING) * 2, None

    (found,) = compiled(lambda x: jax.lax.scan(turn, x, length=5)[0], X).collectives()
    assert found.times == 5


def test_traffic_is_that_of_what_is_read_and_written():
    program = hlo.parse(jax.jit(lambda x: x + 1).lower(jnp.zeros((256, 1024))).compile().as_text())
    assert program.traffic() == pytest.approx(2 * 2**20, rel=0.01)


def test_a_slice_of_a_stack_counts_as_the_slice():
    def turn(carry, row):
        return carry + row, carry * 2

    program = hlo.parse(jax.jit(lambda x: jax.lax.scan(turn, x[0], x)).lower(jnp.zeros((64, 4096))).compile().as_text())
    # Four rows of 16 KiB a turn, not the whole stack of 1 MiB; the rest is the copy in and out.
    assert program.traffic() < 64 * 8 * 16384 + 6 * 2**20


def test_a_reduce_scatter_that_a_tpu_fuses_is_found_as_one():
    text = """HloModule m

%all-reduce-scatter.1 (p: f32[64]) -> f32[16] {
  %p = f32[64]{0} parameter(0)
  %r = f32[64]{0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = f32[16]{0} dynamic-slice(%r, %i), dynamic_slice_sizes={16}
}

ENTRY %main (x: f32[64]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  ROOT %f = f32[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (found,) = hlo.parse(text).collectives()
    assert (found.kind, found.sent, found.times, len(found.group)) == ("reduce-scatter", 64 * 4 * 3 / 4, 1, 4)


def test_a_gather_that_a_tpu_spreads_over_other_work_counts_once():
    gather = """  %p = bf16[16]{0} parameter(0)
  ROOT %g = bf16[64]{0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, f={chain_id="CHAIN"}
}
"""
    text = "HloModule m\n"
    for number, chain in enumerate("007"):
        text += f"\n%step.{number} (p: bf16[16]) -> bf16[64] {{\n{gather.replace('CHAIN', chain)}"
    text += "\nENTRY %main (x: bf16[16]) -> bf16[64] {\n  %x = bf16[16]{0} parameter(0)\n"
    for number in range(3):
        text += f"  %f.{number} = bf16[64]{{0}} fusion(%x), kind=kCustom, calls=%step.{number}\n"
    assert [(c.kind, c.sent, c.times) for c in hlo.parse(text + "}\n").collectives()] == 2 * [("all-gather", 96, 1)]


def test_of_two_branches_the_one_counts_that_runs_where_the_condition_holds():
    def twice(x):
        return jax.lax.ppermute(jax.lax.ppermute(x, "sequence", RING) + 1, "sequence", RING)

    def once(x):
        return jax.lax.ppermute(x, "sequence", RING)

    found = compiled(lambda x: jax.lax.cond(jax.lax.psum(x, "sequence").sum() > 0, once, twice, x), X).collectives()
    assert [c.kind for c in found].count("collective-permute") == 1


TEXT = """HloModule m

%cond (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[4]{0:T(256)}) parameter(0)
  %n = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[]{:T(128)}, f32[4]{0:T(256)}) parameter(0)
  %x = f32[4]{0:T(256)} get-tuple-element(%p), index=1
  %g = f32[16]{0:T(256)} all-gather(%x), replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}, dimensions={0}
  %h = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}, dimensions={0}
  %k = f32[8]{0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %t = (s32[], f32[4]{0:T(256)}) tuple(%zero, %x)
  %w = (s32[]{:T(128)}, /*index=1*/f32[4]{0:T(256)}) while(%t), condition=%cond, body=%body
}
"""


def test_the_text_of_the_tpu_compiler_is_understood():
    first, second, third = hlo.parse(TEXT).collectives()
    assert (first.times, first.group, first.sent) == (7, (0, 2, 4, 6), 48)
    assert second.group == (0, 1, 4, 5)
    assert third.group == (0, 4)
