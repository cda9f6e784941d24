"""Every committed configuration describes something that can be built."""

import jax
import pytest
from conftest import ROOT

from vgjax import experiment, plan, sample
from vgjax.training import program

CONFIGS = [
    *(f"causal_vae.py:{size}" for size in ("small", "4x8x8")),
    *(f"mmdit.py:{size}" for size in ("s", "b", "l", "2b", "13b")),
    *(f"{name}.py:{arg}" for name in ("clips", "quickstart", "shapes") for arg in ("vae", "dit")),
    "hunyuan_video.py",
    *(f"wan.py:{size}" for size in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-t2v-a14b")),
]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_built_and_its_parameters_have_shapes(name, tmp_path):
    config, _, _ = program.read_config(["", "--config", str(ROOT / "configs" / name)], "", workdir=False)
    config = experiment.resolve(config, tmp_path)
    vae = plan.vae_of(plan.parse(["--topology", "none"])[0]) if config.objective.kind != "vae" else None
    built = experiment.build(config, vae)
    count = sum(leaf.size for leaf in jax.tree.leaves(sample.wanted(built)))
    assert count > 10_000 and (count > 12.8e9) == name.endswith(("13b", "14b", "hunyuan_video.py"))


def test_all_configs_are_tried():
    assert {name.partition(".")[0] for name in CONFIGS} == {path.stem for path in (ROOT / "configs").glob("*.py")}
