"""What every entry point does first: process-wide settings, and the command line of a config."""

import ast
import gc
import itertools
import os
import re
import uuid
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from vgjax.errors import UserError

# Sections whose options are checked, before anything starts, against what they configure: a flag may set one that the
# file leaves alone.
OPEN = (
    "data",
    "evaluate",
    "known",
    "layout",
    "lora",
    "model",
    "objective",
    "sample",
    "shift",
    "text",
    "time",
    "tokenizer",
    "train",
)


def start(absent: bool = False) -> None:
    """Keeps compiled programs across starts (JAX_COMPILATION_CACHE_DIR, default ~/.cache/vgjax), so that a restart of
    a job costs seconds, not a compilation. Programs for `absent` devices cannot be read back, and those that are there
    are left alone."""
    jax.config.update("jax_enable_compilation_cache", not absent)
    if absent:
        jax.config.update("jax_platforms", "cpu")
    if (devices := jax.config.jax_num_cpu_devices) > 1:
        # A virtual device keeps a thread for every collective it waits in. With one thread a device (XLA's default on
        # few cores) two collectives at a time wait for each other, and the process aborts after 40 seconds.
        os.environ.setdefault("PJRT_NPROC", str(8 * devices))
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "vgjax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain reads absl flags, also under argparse
    gc.freeze()  # what is imported stays: a tenth of the time of a start went into looking for garbage in it


def read_config(argv: list[str], usage: str, workdir: bool = True) -> tuple[ConfigDict, ConfigDict, str | None]:
    """(config, the file's own values, workdir) of `--config FILE[:ARG] [--config.key=value ...] --workdir DIR`.

    A flag may also set an option of an `OPEN` section that the file does not name, written with `=`, or begin such a
    section; `experiment` refuses what is none. `--config.layout=NAME` is short for its `kind`.
    Without `workdir` that flag may be missing.
    """
    named = [(arg, after) for arg, after in itertools.pairwise([*argv[1:], ""]) if re.match(r"--?config(=|$)", arg)]
    if not named:
        raise UserError(f"command line: --config is missing; {usage}")
    spec = named[-1][0].partition("=")[2] or named[-1][1]
    if not Path(re.sub(r"(\.py):.*$", r"\1", spec)).is_file():
        raise UserError(f"--config {spec}: there is no such file; {usage}")
    defaults, _ = _parse([argv[0], "--config", spec], usage)
    rest, added = _sorted(argv[1:], defaults)
    config, flagset = _parse([argv[0], *rest], usage)
    with config.unlocked():
        for section, option, value in added:
            config[section] = {**config.get(section, {}), option: value}
    if workdir and not flagset.workdir:
        raise UserError(f"command line: --workdir is missing; {usage}")
    return config, defaults, flagset.workdir


def size_of(text: str | None) -> tuple[int, int] | None:
    """(height, width) of `HxW`."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if found is None:
        raise UserError(f"--size {text!r} is no size: write HEIGHTxWIDTH, as 256x448")
    return int(found[1]), int(found[2])


def _parse(argv: list[str], usage: str) -> tuple[ConfigDict, flags.FlagValues]:
    flagset = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=flagset, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "folder of checkpoints, logs and images", flag_values=flagset)
    try:
        rest = flagset(argv)[1:]
        config = flagset.config
    except UserError as error:
        raise UserError(f"--config: {error}") from error
    except flags.Error as error:
        raise UserError(f"command line: {_first_line(error)}; {usage}") from error
    except Exception as error:  # a config file is Python: whatever else it raises is the user's to mend
        raise UserError(f"--config: the file cannot be read: {type(error).__name__}: {_first_line(error)}") from error
    if rest:
        raise UserError(f"command line: {rest[0]!r} is not a flag; {usage}")
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config returned a {type(config).__name__}: it must return a ConfigDict")
    return config, flagset


def _sorted(args: list[str], defaults: ConfigDict) -> tuple[list[str], list[tuple[str, str, object]]]:
    """(flags of keys that the file has, and all else; section, option and value of those it leaves alone)."""
    rest, added = [], []
    for arg in (re.sub(r"^--?config\.layout=", "--config.layout.kind=", arg) for arg in args):
        key, equals, value = re.fullmatch(r"(?:--?config\.([\w.]+))?(=?)(.*)", arg, re.DOTALL).groups()
        section, _, option = (key or "").partition(".")
        own = defaults.get(section, ConfigDict())
        own = own if isinstance(own, ConfigDict) else {option: 0}
        # Absl's flags have a type: they neither take None nor give another value to what is None.
        free = option not in own or value == "None" or (option.isidentifier() and own[option] is None)
        if equals and section in OPEN and option.isidentifier() and free:
            added.append((section, option, _value(value)))
            continue
        if key:
            _check_known(defaults, key)
            added = [one for one in added if one[:2] != (section, option)]  # the last flag of a key counts
        rest.append(arg)
    return rest, added


def _value(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _check_known(config: ConfigDict, key: str) -> None:
    at, seen = config, "config"
    for part in key.split("."):
        if not isinstance(at, ConfigDict) or part not in at:
            known = f"known keys are {', '.join(at)}" if isinstance(at, ConfigDict) else f"{seen} is a single value"
            raise UserError(f"{seen}.{part} is unknown: {known}")
        at, seen = at[part], f"{seen}.{part}"


def workdir(path: str) -> Path:
    """The folder, made and known to be writable."""
    if "://" in path:
        raise UserError(f"cannot write to {path}: only mounted file systems are supported, mount the bucket")
    folder = Path(path).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"  # all processes of a job look at once
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another folder") from error
    return folder


def _first_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return next((line for line in text.splitlines() if line.strip()), type(error).__name__)
