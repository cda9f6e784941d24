"""The real TPU compiler takes what is meant to run there: kernels, train step, sampler, offloading; without a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import planned
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vgjax import plan
from vgjax.attention.segments import Segments
from vgjax.attention.splash import splash
from vgjax.errors import UserError
from vgjax.nn.stack import Stack
from vgjax.parallel import layouts, sharding
from vgjax.planner import report, topology

SLICE = "v5e:2x2"
# Two heads of 64 and 1280 video tokens: enough for the kernel.
TINY = ["--size", "256x256", "--frames", "17", "--batch", "2", "--config.precision=bfloat16"]
TINY += ["--config.model.dim=128", "--config.model.rope_dims=(16,24,24)", "--config.model.remat=attention"]
TINY += ["--config.model.refiner_blocks=0", "--config.text.blocks=0"]  # those are of the blocks' own parts


def on(name):
    """Where one absent chip is."""
    mesh = Mesh(np.array(topology.find(name).devices[:1]), ("one",))
    return NamedSharding(mesh, PartitionSpec())


@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_tpu_takes_the_attention_kernel_forward_and_backward(chip):
    one = on(chip)
    x = jax.ShapeDtypeStruct((1, 4500, 2, 128), jnp.bfloat16, sharding=one)
    ids = jax.ShapeDtypeStruct((1, 4500), jnp.int32, sharding=one)

    def loss(q, k, v, ids):
        return jnp.sum(splash(q, k, v, Segments(ids, ids)).astype(jnp.float32))

    done = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, ids).compile()
    assert done.as_text().count("tpu_custom_call") >= 3  # forward, dq, dk and dv
    assert done.memory_analysis().temp_size_in_bytes < 4500 * 4500  # no scores in memory


def test_a_ring_runs_the_kernel_on_every_block_and_keeps_none_of_them():
    layout = layouts.named("ring")
    mesh = layout.mesh(topology.find(SLICE).devices)
    x, ids = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(None, "sequence")))
        for shape, dtype in (((1, 32768, 16, 128), jnp.bfloat16), ((1, 32768), jnp.int32))
    )

    def loss(q, k, v, ids):
        return jnp.sum(layout.attention()(q, k, v, Segments(ids, ids)).astype(jnp.float32))

    with sharding.use(layout, mesh):
        done = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x, ids).compile()
    text = done.as_text()
    assert text.count("tpu_custom_call") >= 6 and "collective-permute" in text  # each kernel in the loop and behind it
    local = 8192 * 16 * 128 * 4  # one fp32 tensor of a device
    assert done.memory_analysis().temp_size_in_bytes < 16 * local  # each block kept would add two


@pytest.mark.parametrize("job,kind", [("train", "ulysses"), ("sample", "fsdp_tp")])
def test_a_slice_takes_the_train_step_and_the_sampler(job, kind):
    built = planned(*TINY, f"--config.layout={kind}")
    layout = layouts.named(kind)
    mesh = layout.mesh(topology.find(SLICE).devices)
    with sharding.use(layout, mesh):
        made = (plan.train_job if job == "train" else plan.sample_job)(built, layouts.Placement(layout, mesh))
        done = made.lowered.compile()
    text = done.as_text()
    assert "tpu_custom_call" in text and ("all-to-all" if kind == "ulysses" else "all-reduce") in text
    assert " sort(" not in text  # of ids, to find queries without keys: self-attention has none
    assert done.memory_analysis().temp_size_in_bytes < 2**30
    if job == "train":
        row = report.Row(kind, dict(mesh.shape), built.config.train.batch, False, available=1.0)
        quick = plan.attempt(row, made, topology.QUICK, mesh, topology.find(SLICE))
        exact = plan.measured(row, done, made, mesh, topology.find(SLICE))
        assert quick.collectives == {
            kind: pytest.approx(sent, rel=0.1, abs=20_000) for kind, sent in exact.collectives.items()
        }
        assert exact.activations - quick.activations < 0.05 * exact.activations


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(x.shape[-1])(jnp.tanh(nn.Dense(4 * x.shape[-1])(x)))


def test_offloading_moves_activations_to_the_host():
    one, memory = on("v4:2x2x1"), {}
    x = jax.ShapeDtypeStruct((8192, 1024), jnp.float32, sharding=one)
    for remat in ("full", "offload"):
        stack = Stack(Block, 8, remat)
        params = jax.eval_shape(stack.init, jax.random.key(0), x)
        params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), params)
        grad = jax.jit(jax.grad(lambda p, x, stack=stack: jnp.sum(stack.apply(p, x) ** 2)))
        memory[remat] = grad.lower(params, x).compile().memory_analysis()
    carries = 8 * 8192 * 1024 * 4
    assert memory["offload"].host_temp_size_in_bytes >= carries > memory["full"].host_temp_size_in_bytes
    assert memory["full"].temp_size_in_bytes - memory["offload"].temp_size_in_bytes > carries / 2


def test_what_is_too_large_is_said_in_bytes():
    x = jax.ShapeDtypeStruct((200_000, 64), jnp.bfloat16, sharding=on(SLICE))
    row = report.Row("dp", {}, 1, False, available=16.0 * report.GIB)
    with pytest.raises(Exception) as raised:  # noqa: B017  the compiler's own type
        jax.jit(lambda x: x @ x.T).lower(x).compile()
    said = plan.refusal(raised.value, row)
    assert said["reason"] == "too large" and said["needed"] > 74 * report.GIB > said["available"] > 14 * report.GIB


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5p:0x2x2", "h100:x"])
def test_an_unknown_topology_is_refused_with_those_that_are_known(name):
    with pytest.raises(UserError, match="v5p"):
        topology.find(name)
