"""Programs as forks of one process that has imported what they import: a start costs seconds of imports.

`Fork` is to `python -m vgjax.<module> args` what `subprocess.Popen` is: the process is a real one, with an environment,
an exit code and a death of its own. Two things a fork does not show, and a true `python -m` must: that the module
imports all that it uses, and that nothing depends on Python's hash seed, which all forks share.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PROGRAMS = ("train", "sample", "encode", "evaluate", "convert", "plan")
LARGEST = 2**17  # bytes of a message


class Fork:
    """`python -m vgjax.<module> args` in the folder of the repository; its members are those of `subprocess.Popen`.

    `stdout` and `stderr` are open files; `stdout` may be `subprocess.PIPE`, whose other end is then `self.stdout`.
    """

    def __init__(self, module: str, args: Sequence[Any], env: Mapping[str, str], stdout: Any, stderr: Any):
        self.args, self.returncode, self.stdout = [f"vgjax.{module}", *map(str, args)], None, None
        request = json.dumps({"args": self.args, "env": dict(env)}).encode()
        with contextlib.ExitStack() as theirs:
            if stdout == subprocess.PIPE:
                own, other = os.pipe()
                self.stdout, stdout = os.fdopen(own), theirs.enter_context(os.fdopen(other, "wb"))
            self.status, status = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            theirs.enter_context(status)
            socket.send_fds(server()[1], [request], [file.fileno() for file in (stdout, stderr, status)])
        said, (self.pidfd,), _, _ = socket.recv_fds(self.status, LARGEST, 1)
        self.pid = int(said)

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self.status.recv(LARGEST))
            self.status.close()
            os.close(self.pidfd)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(module: str, args: Sequence[Any], env: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess:
    """As `subprocess.run` with `capture_output` and `text`."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = Fork(module, args, env, out, err)
        try:
            process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(process.args, process.returncode, out.read(), err.read())


@functools.cache
def server() -> tuple[subprocess.Popen, socket.socket]:
    """(the process that forks, the socket on which it is asked to), started when the first fork is."""
    own, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with other:
        # JAX reads its settings when it is imported, each fork gets its own; BLAS threads would not survive a fork.
        env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        env |= {"OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, __file__, str(other.fileno())]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=ROOT, env=env, pass_fds=[other.fileno()], **quiet)
    return process, own


def end() -> None:
    """Ends the server, and with it the forks that are left."""
    if server.cache_info().currsize:
        process, control = server()
        control.close()
        process.wait()
        server.cache_clear()


def serve(control: socket.socket) -> list[str]:
    """Forks as it is asked to until nobody can ask any more; returns in each fork alone, with what it is to run."""
    running: dict[int, tuple[int, socket.socket]] = {}  # by the file descriptor of a process: (its id, who waits)
    while True:
        for ready in select.select([control, *running], [], [])[0]:
            if ready is not control:
                pid, status = running.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.close(ready)
                with status, contextlib.suppress(OSError):  # nobody waits any more
                    status.send(str(code).encode())
                continue
            said, files, _, _ = socket.recv_fds(control, LARGEST, 3)
            if not said:
                for pid, _ in running.values():
                    os.kill(pid, signal.SIGKILL)
                sys.exit()
            stdout, stderr, status = files
            status = socket.socket(fileno=status)
            if not (pid := os.fork()):
                for pidfd, (_, other) in running.items():
                    os.close(pidfd)
                    other.close()
                control.close()
                status.close()
                return become(json.loads(said), stdout, stderr)
            pidfd = os.pidfd_open(pid)
            socket.send_fds(status, [str(pid).encode()], [pidfd])
            running[pidfd] = pid, status
            os.close(stdout)
            os.close(stderr)


def become(request: dict[str, Any], stdout: int, stderr: int) -> list[str]:
    """Gives this process the files and the environment of a request: the words of its command line."""
    import jax

    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    for name, default in jax.config.values.items():
        if (value := os.environ.get(name.upper())) is not None:
            jax.config.update(name, read(value, default))
    return request["args"]


def read(value: str, default: Any) -> Any:
    """A setting of JAX as an environment variable has it."""
    if isinstance(default, bool):
        return value.lower() in ("y", "yes", "t", "true", "on", "1")
    return value if default is None else type(default)(value)


def prepare() -> None:
    """Imports what programs import, and makes sure that a fork has all of it."""
    sys.path[0] = str(ROOT)  # as `python -m` has it
    for name in PROGRAMS:
        importlib.import_module(f"vgjax.{name}")
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would not have these threads"
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    prepare()
    module, *args = serve(socket.socket(fileno=int(sys.argv[1])))
    # As it is before `python -m` runs a module: not yet imported.
    delattr(sys.modules["vgjax"], module.removeprefix("vgjax."))
    del sys.modules[module]
    sys.argv[1:] = args
    runpy.run_module(module, run_name="__main__", alter_sys=True)
