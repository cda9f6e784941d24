"""The planner: what a step needs and where its state lies; test_topology compiles it."""

import jax
import pytest
from conftest import planned

from vgjax import layouts, plan, sharding

SMALL = ("--size", "32x32")


@pytest.mark.parametrize("job", ["train", "sample"])
def test_model_flops_grow_with_the_batch_and_not_with_the_layout(job):
    alone, twice = (plan.model_flops(planned(*SMALL, "--batch", str(n)), job) for n in (4, 8))
    assert alone > 0 and 1.9 < twice / alone <= 2.0
    assert plan.model_flops(planned(*SMALL, "--batch", "4", "--config.layout=ring"), job) == alone


def test_the_planned_step_is_lowered_for_a_mesh_and_its_state_is_spread_over_it():
    layout, mesh = where = layouts.find("fsdp", 8)
    model = planned(*SMALL, "--batch", "8", "--config.layout=fsdp")
    with sharding.use(layout, mesh):
        job = plan.train_job(model, where)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(job.params))
    assert whole / 8 <= plan.memory_of_state(job)["params"] < whole / 4
    assert job.flops > plan.model_flops(model, "train") / 2 and job.tokens > 0
