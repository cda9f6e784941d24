#!/usr/bin/env python3
"""A job of several processes on this machine, watched and restarted: what a pod does, tried out on a laptop.

    python launch/local.py 2 vgjax.train --config configs/mmdit.py:s --workdir runs/s --config.layout.kind=fsdp

Every line comes with the number of its process in front. SIGTERM is passed on, so that all processes save the same step
and end; a second one ends them at once. When one ends badly the rest are ended too, and where its exit code says that a
restart may help (see `vgjax/errors.py`, or a signal), all are started again, at most --restarts times.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from vgjax.errors import PREEMPTED, RESTARTABLE


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("processes", type=int)
    parser.add_argument("module", help="vgjax.train, vgjax.sample, ...")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--grace", type=float, default=5.0, help="seconds for last words when another has died")
    args, rest = parser.parse_known_args()
    if args.processes < 1:
        parser.error(f"{args.processes} processes: at least 1 is needed")
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    for left in range(args.restarts, -1, -1):
        code = run(args.processes, [sys.executable, "-m", args.module, *rest], asked, args.grace)
        again = left and not asked and (code < 0 or code in RESTARTABLE)
        if code == 0 or not again:
            return code if code >= 0 else 128 - code
        print(f"a process ended with {code}: starting all again, {left} times at most", file=sys.stderr, flush=True)
    return code


def run(count: int, command: list[str], asked: list[int], grace: float) -> int:
    """Starts the processes and waits for them: 0, or the exit code of the first that failed."""
    with tempfile.TemporaryDirectory() as folder:
        failure = Path(folder) / "failure"
        code = watch(count, command, asked, grace, failure)
        # Those that lost the first may have ended before it; one that was killed has written nothing.
        return int(failure.read_text()) if code > 0 and failure.exists() else code


def watch(count: int, command: list[str], asked: list[int], grace: float, failure: Path) -> int:
    """The same, by the order in which the processes end; each is to write to `failure` why it fails."""
    where = {"VGJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "VGJAX_PROCESSES": str(count)}
    where["VGJAX_FAILURE"] = str(failure)
    processes, relays = [], []
    for i in range(count):
        environment = {**os.environ, **where, "VGJAX_PROCESS": str(i), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        processes.append(process)
        relays.append(threading.Thread(target=relay, args=(process, i), daemon=True))
        relays[-1].start()
    told, first, died = 0, 0, 0.0
    while any(process.poll() is None for process in processes):
        codes = [process.poll() for process in processes]
        if len(asked) > told:
            told = len(asked)
            for process in processes:
                process.terminate() if told == 1 else process.kill()
        ended = [code for code in codes if code]
        # Preempted processes end by themselves, one after the other.
        if ended and not first:
            first, died = ended[0], time.monotonic()
        if first and first != PREEMPTED and time.monotonic() - died > grace:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    for thread in relays:
        thread.join(2)
    return first or next((process.returncode for process in processes if process.returncode), 0)


def relay(process: subprocess.Popen, number: int) -> None:
    for line in process.stdout:
        sys.stdout.write(f"[{number}] {line}")
        sys.stdout.flush()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
