"""The planner: what a step needs and where its state lies; test_topology compiles it."""

import argparse
import dataclasses
import json

import jax
import pytest
from conftest import ROOT, planned

from vgjax import experiment, plan
from vgjax.parallel import layouts, sharding
from vgjax.planner import chips, report, topology
from vgjax.training import program

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
        assert job.flops > plan.model_flops(model, "train") / 2 and job.tokens > 0
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(job.params))
    assert whole / 8 <= plan.memory_of_state(job)["params"] < whole / 4


def test_adapters_are_planned_with_the_frozen_model_beside_them():
    where = layout, mesh = layouts.find("fsdp", 8)
    found = {}
    for rank in (0, 4):
        given = [
            "--topology",
            "none",
            "--batch",
            "8",
            "--frames",
            "5",
            "--size",
            "64x64",
            "--config",
            "configs/wan.py:own",
        ]
        args, rest = plan.parse([*given, f"--config.lora.rank={rank}", "--config.layout=fsdp"])
        config, _, _ = program.read_config(["plan", *rest], "", workdir=False)
        config.model = dict(kind="crossdit", dim=64, heads=2, inner=96, blocks=2, channels=16, text_dim=32)
        built = experiment.build(plan.adapt(config, args), plan.vae_of(args))
        with sharding.use(layout, mesh):
            job = plan.train_job(built, where)
        found[rank] = plan.memory_of_state(job), plan.model_flops(built, "train"), plan.model_flops(built, "sample")
    whole, adapted = found[0], found[4]
    assert adapted[1] == pytest.approx(whole[1] * 2 / 3, rel=0.1) and adapted[2] == pytest.approx(whole[2], rel=0.1)
    assert whole[0]["params"] / 2 < adapted[0]["params"] < whole[0]["params"]  # bf16 beside adapters in fp32
    assert adapted[0]["optimizer"] < whole[0]["optimizer"] / 3


def row(layout, **more):
    return report.Row(layout, {"data": 1}, **{"batch": 8, "fits": True, "step_seconds": 1.0, **more})


def test_the_best_layout_brings_the_most_tokens_a_second_of_those_that_fit():
    some = [
        row("dp", tokens_per_second=9.0, fits=False),
        row("fsdp", tokens_per_second=8.0, batch=16, step_seconds=2.0, network_seconds=2.0),
        row("tp", tokens_per_second=5.0),
    ]
    chosen, why = report.best(some)
    assert chosen.layout == "fsdp" and "1.60x those of tp" in why and "bound by network" in why
    some = [row(kind, tokens_per_second=8.0, network_seconds=more) for kind, more in (("fsdp", 0.3), ("hsdp", 0.2))]
    chosen, why = report.best(some)
    assert chosen.layout == "hsdp" and "as many as fsdp" in why
    large = row("dp", fits=False, needed=40.0 * report.GIB, available=16.0 * report.GIB)
    alone = dataclasses.replace(large, layout="tp", needed=20.0 * report.GIB, reason=report.STATE)
    nothing, why = report.best([alone, large])
    assert nothing is None and "the smallest, dp, needs 40.0 of 16.0 GiB:" in why
    assert "tp, needs 20.0 of 16.0 GiB for what lives between steps alone:" in report.best([alone])[1]
    odd = row("dp", fits=False, reason="batch 12 does not divide into 8: try 16")
    assert report.best([odd]) == (None, f"no layout was planned: {odd.reason}")


@pytest.fixture
def eight():
    return topology.Topology("eight", tuple(jax.devices()), chips.CHIPS["H100"], 8)


@pytest.mark.parametrize("largest,found", [(24, 24), (1000, 512), (3, 8)])
def test_search_finds_the_largest_batch_that_fits_and_divides(monkeypatch, eight, largest, found):
    tried = []

    def compiled(config, kind, where, args):
        tried.append(config.train.batch)
        return row(kind, batch=config.train.batch, fits=config.train.batch <= largest)

    monkeypatch.setattr(plan, "compiled", compiled)
    config = planned(*SMALL, "--batch", "8", "--config.layout=fsdp").config
    assert plan.plan(config, "fsdp", eight, argparse.Namespace(search=True)).batch == found
    assert config.train.batch == 8 and len(tried) == len(set(tried)) and not any(batch % 8 for batch in tried)


def test_a_batch_that_does_not_divide_is_a_row_with_the_nearest_that_does(eight):
    config = planned(*SMALL, "--batch", "12", "--config.layout=fsdp").config
    args, _ = plan.parse(["--topology", "none"])
    refused = plan.compiled(config, "fsdp", eight, args)
    assert not refused.fits and refused.reason == "batch 12 does not divide into 8: try 16"
    assert refused.reason in "".join(report.table([refused], config, eight, args))


def test_micro_batches_smaller_than_the_devices_are_refused_as_in_a_training(eight):
    args, _ = plan.parse(["--topology", "none"])
    config = planned(*SMALL, "--batch", "8", "--config.layout=fsdp", "--config.optim.accumulate=4").config
    assert plan.compiled(config, "fsdp", eight, args).reason == "batch 8 does not divide into 32: try 32"


@pytest.mark.parametrize("job", ["train", "sample"])
def test_a_large_leaf_that_a_layout_cannot_split_is_a_row_that_names_it(monkeypatch, eight, job):
    monkeypatch.setattr(sharding, "LARGE", 1000)
    monkeypatch.setattr(plan, "attempt", lambda *_: pytest.fail())
    args, _ = plan.parse(["--topology", "none", "--job", job])
    config = planned(*SMALL, "--batch", "8", "--config.layout=fsdp", "--config.model.dim=20").config
    config.model.rope_dims = (2, 4, 4)
    refused = plan.compiled(config, "fsdp", eight, args)
    assert not refused.fits and "over fsdp=8, which divides none of its dims" in refused.reason


@pytest.mark.parametrize("part,compilations", [(0.5, 1), (0.97, 2), (1.05, 2), (3.0, 1)])
def test_what_nearly_fits_is_compiled_again_as_for_a_run(monkeypatch, eight, part, compilations):
    where, asked = dataclasses.replace(eight, quick={"effort": -1}), []

    def attempt(row, job, options, mesh, where):
        asked.append(dict(options))
        return dataclasses.replace(row, needed=part * row.available, fits=part < 1)

    monkeypatch.setattr(plan, "attempt", attempt)
    args, _ = plan.parse(["--topology", "none"])
    assert plan.compiled(planned(*SMALL, "--batch", "8").config, "dp", where, args).fits == (part < 1)
    assert asked == [{"effort": -1}, {}][:compilations]


def test_what_has_no_room_for_its_state_is_not_compiled_to_find_out(monkeypatch, eight):
    where = dataclasses.replace(eight, chip=dataclasses.replace(eight.chip, memory=1e5))
    monkeypatch.setattr(plan, "attempt", lambda *_: pytest.fail())
    config, (args, _) = planned(*SMALL, "--batch", "8").config, plan.parse(["--topology", "none"])
    found = plan.compiled(config, "dp", where, args)
    assert not found.fits and found.needed == found.params + found.optimizer > 1e5
    assert "for what lives between steps alone" in "".join(report.table([found], config, where, args))


def test_axes_that_the_config_asks_for_are_those_of_its_own_layout(eight):
    config = planned(*SMALL, "--batch", "8", "--config.layout=fsdp_tp", "--config.layout.tensor=2").config
    sizes = {kind: dict(plan.mesh_of(config, kind, eight)[1].shape) for kind in ("tp", "fsdp_tp")}
    assert sizes["fsdp_tp"]["tensor"] == 2 and sizes["tp"]["tensor"] == 8


def test_the_program_plans_two_slices_and_writes_what_it_found(tmp_path, capsys):
    size = ["--batch", "8", "--size", "32x32", "--vae", "tiny", "--frames", "5"]
    where = ["--topology", "v5e:2x2", "--slices", "2", "--job", "sample", "--layouts", "fsdp", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stopped:
        plan.main(["plan", "--config", str(ROOT / "tests" / "tiny.py:dit"), *size, *where])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "plan.json").read_text())
    (found,) = record["rows"]
    assert found["mesh"] == {"data": 2, "fsdp": 4, "sequence": 1, "tensor": 1} and found["fits"]
    assert found["network_seconds"] > 0 and 0 < found["mfu"] < 1 and found["tokens_per_second"] > 0
    assert said.strip() == (tmp_path / "plan.txt").read_text().strip() and "8 devices of 2 x v5e:2x2" in said
    assert (tmp_path / "plan.png").stat().st_size > 5000


def test_without_the_compiler_of_a_chip_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    for name, extra in (("v5p:2x2x1", "tpu"), ("h100:8", "cuda")):
        with pytest.raises(topology.UserError, match=rf"vgjax\[{extra}\]"):
            topology.find(name)
