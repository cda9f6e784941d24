"""Every committed configuration describes something that can be built."""

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from vgjax import experiment, plan
from vgjax.errors import UserError
from vgjax.open.store import READERS
from vgjax.pipeline import trained
from vgjax.training import program

CONFIGS = [
    *(f"causal_vae.py:{size}" for size in ("small", "4x8x8")),
    *(f"mmdit.py:{size}" for size in ("s", "b", "l", "2b", "13b")),
    *(f"{name}.py:{arg}" for name in ("clips", "quickstart", "shapes") for arg in ("vae", "dit")),
    "hunyuan_video.py",
    *(f"wan.py:{size}" for size in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-t2v-a14b")),
]


def built_of(name, folder):
    """The experiment of a committed config."""
    config, _, _ = program.read_config(["", "--config", str(ROOT / "configs" / name)], "", workdir=False)
    config = experiment.resolve(config, folder)
    vae = plan.vae_of(plan.parse(["--topology", "none"])[0]) if config.objective.kind != "vae" else None
    return experiment.build(config, vae)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_built_and_its_parameters_have_shapes(name, tmp_path):
    built = built_of(name, tmp_path)
    count = sum(leaf.size for leaf in jax.tree.leaves(trained.wanted(built)))
    assert count > 10_000 and (count > 12.8e9) == name.endswith(("13b", "14b", "hunyuan_video.py"))


def test_every_model_is_built_by_a_config_or_for_a_published_class(tmp_path):
    built = {cls.__module__ for cls, *_ in READERS.values()}
    for name in CONFIGS:
        objective = built_of(name, tmp_path).objective
        built |= {
            type(part).__module__ for part in (objective.model, objective.codec, getattr(objective, "text", None))
        }
    files = {f"vgjax.models.{path.stem}" for path in (ROOT / "vgjax" / "models").glob("[a-z]*.py")}
    assert files <= built


def test_all_configs_are_tried():
    folders = {"scratch"}  # asks for converted folders: tests/pipeline/test_frozen.py has them
    assert folders | {name.partition(".")[0] for name in CONFIGS} == {
        path.stem for path in (ROOT / "configs").glob("*.py")
    }


def test_a_player_may_have_an_optimizer_and_a_cadence_of_its_own():
    shared = dict(kind="muon", lr=1e-3, schedule="cosine", warmup=2, momentum=0.9, ema=0.9, accumulate=2)
    own = dict(kind="adamw", b1=0.5, lr=3e-3, every=2, starts=10)
    optim = ConfigDict({**shared, "players": {"critic": own}})
    (codec, critic), accumulate = experiment.players(optim, 100, ("vae", "critic"))
    assert (codec.every, codec.starts, codec.ema, accumulate) == (1, 0, 0.9, 2) and codec.always
    assert (critic.every, critic.starts, critic.ema, critic.updates(100)) == (2, 10, 0.9, 45)
    state = critic.optimizer.init({"kernel": jnp.ones((2, 2))})
    update, _ = critic.optimizer.update({"kernel": jnp.ones((2, 2))}, state, {"kernel": jnp.ones((2, 2))})
    assert jax.tree.leaves(update)[0].max() == 0  # the warm-up counts its own updates


@pytest.mark.parametrize(
    "players, words",
    [
        ({"judge": {}}, "config.optim.players.judge is nobody: the players are vae"),
        ({"vae": {"starts": 100}}, "config.optim.players.vae.starts=100: it never learns"),
        ({"vae": {"each": 2}}, "config.optim.players.vae.each is unknown"),
        ({"vae": {"every": 0}}, "the player vae needs"),
    ],
)
def test_players_that_make_no_sense_are_refused(players, words):
    optim = ConfigDict(dict(kind="adamw", lr=1e-3, schedule="constant", warmup=0, players=players))
    with pytest.raises(UserError, match=words):
        experiment.players(optim, 100, ("vae",))


def test_what_a_config_leaves_out_is_there_for_every_reader(tmp_path):
    config, _, _ = program.read_config(["", "--config", "tests/tiny.py:dit"], "", workdir=False)
    with config.unlocked():
        for key in ("layout.devices", "shift.factor", "data.drop_caption", "optim.accumulate", "optim.clip"):
            section, _, option = key.partition(".")
            del config[section][option]
    config = experiment.resolve(config, tmp_path)
    assert (config.layout.devices, config.shift.factor, config.data.drop_caption) == (0, 1.0, 0.0)
    assert trained.settings_of(config).shift == 1.0
