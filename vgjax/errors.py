"""What may go wrong and with which exit code the process says so.

A `UserError` is one sentence that a stranger can act on: what is wrong, where, what would do. `door` wraps the
`main` of every entry point: user errors become that sentence and a documented exit code, everything else keeps its
traceback. Schedulers restart on `RESTARTABLE` codes only.
"""

import contextlib
import functools
import math
import os
import sys
from collections.abc import Callable

OK = 0
CRASH = 1  # a bug: the traceback is printed
USER = 2  # bad input or configuration: restarting changes nothing
DIVERGED = 3  # too many non-finite steps in a row, or a sample that is not finite; what was saved is untouched
STORAGE = 4  # a checkpoint could not be written or no good one could be read
LOADER = 5  # the data loader died
HUNG = 6  # nothing happened for too long, here or in another process of the job
PREEMPTED = 75  # state saved after SIGTERM: start the same command again (EX_TEMPFAIL)
RESTARTABLE = (LOADER, HUNG, PREEMPTED)

# How a failed process ends; a job of several processes sets another way, that does not wait for the rest of it.
leave: Callable[[int], None] = sys.exit


def record(code: int) -> None:
    """Writes the code of a job's first failure to the file that its launcher names in VGJAX_FAILURE.

    The processes that lose a failed one end with codes of their own, which would hide why the job ended.
    """
    if path := os.environ.get("VGJAX_FAILURE"):
        with contextlib.suppress(OSError), open(path, "x") as file:
            file.write(str(code))


class UserError(ValueError):
    """Bad input or configuration, said in one sentence."""

    code = USER


class Diverged(UserError):
    """Step after step of a training was not finite, or a sample was not."""

    code = DIVERGED


class StorageError(UserError):
    """A checkpoint could not be written, or none that is good could be read."""

    code = STORAGE


class LoaderError(UserError):
    """A data worker died or stopped answering."""

    code = LOADER


class PeerLost(UserError):
    """Another process of the job is gone."""

    code = HUNG


class Preempted(UserError):
    """The scheduler asked to stop; everything is saved."""

    code = PREEMPTED


def check_finite(**options: float | tuple[float, ...] | None) -> None:
    """UserError naming an option that is, or holds, a number which is not finite."""
    for name, value in options.items():
        numbers = value if isinstance(value, tuple | list) else (value,)
        if not all(math.isfinite(number) for number in numbers if number is not None):
            raise UserError(f"{name}={value} must be finite")


def door(main: Callable[[list[str]], int | None]) -> Callable[[list[str] | None], None]:
    """Wraps `main(argv) -> exit code` so that every failure ends in one sentence and a non-zero exit code."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> None:
        try:
            code = main(sys.argv if argv is None else argv) or OK
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = error.code
        except KeyboardInterrupt:
            print("error: interrupted; start the same command again to continue", file=sys.stderr, flush=True)
            code = 130
        if code != OK:
            record(code)
        if code not in (OK, PREEMPTED):
            leave(code)
        sys.exit(code)

    return run
