"""The command line of a config: what a flag may set, and what it may not."""

import pytest
from conftest import python

from vgjax.errors import USER, UserError
from vgjax.training import program

TINY = ["train", "--config", "tests/tiny.py:dit"]


def read(*flags):
    return program.read_config([*TINY, *flags], "usage", workdir=False)[0]


def test_a_flag_sets_what_the_file_names_and_what_it_leaves_at_its_default():
    config = read("--config.train.batch=8", "--config.train.watchdog=1.5", "--config.model.remat=full")
    assert (config.train.batch, config.train.watchdog, config.model.remat) == (8, 1.5, "full")
    assert "watchdog" not in read().train


def test_a_flag_may_set_none_and_set_what_is_none():
    assert read("--config.data.fps=None").data.fps is None
    assert read("--config.data.fps=None", "--config.data.fps=12.5").data.fps == 12.5


def test_the_layout_has_a_short_form():
    assert read("--config.layout=ring", "--config.layout.sequence=4").layout.to_dict() == {
        "kind": "ring",
        "devices": 1,
        "sequence": 4,
    }


@pytest.mark.parametrize("flag", ["--config.optim.sise=8", "--config.nothing.x=1", "--config.model.dim.x=1"])
def test_a_key_that_nothing_would_check_is_refused(flag):
    with pytest.raises(UserError, match="is unknown"):
        read(flag)


@pytest.mark.parametrize("module", ["encode", "plan"])
def test_a_program_that_no_other_test_starts_by_itself_imports_all_that_it_uses(module):
    ran = python(module, "--nonsense")
    assert ran.returncode == USER and "the following arguments are required" in ran.stderr
