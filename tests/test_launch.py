"""The launchers are sound shell and YAML, restart on the documented exit codes, and pass a stop on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from vgjax.errors import CRASH, DIVERGED, HUNG, LOADER, PREEMPTED, RESTARTABLE, STORAGE, USER

LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound(script):
    shellcheck = Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_the_jobset_restarts_all_but_what_a_restart_cannot_mend():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    of_job = job["template"]["spec"]
    assert of_job["parallelism"] == of_job["completions"]
    (rule,) = of_job["podFailurePolicy"]["rules"]
    pod = of_job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert set(rule["onExitCodes"]["values"]) == {CRASH, USER, DIVERGED, STORAGE}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert (ROOT / container["command"][1]).is_file()
    assert (ROOT / container["args"][2].partition(":")[0]).is_file()


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_vm.sh"])
def test_a_launcher_starts_again_on_exactly_the_restartable_codes(script):
    (codes,) = re.findall(r"^ +([\d |]+)\) ", (LAUNCH / script).read_text(), re.M)
    assert {int(code) for code in codes.split("|")} - {134, 135, 137, 139, 143, 255} == set(RESTARTABLE)


def test_every_process_becomes_the_python_that_must_hear_sigterm():
    assert (LAUNCH / "process.sh").read_text().splitlines()[-1] == 'exec python -m "$@"'


FLAGS = [line.split(None, 3) for line in (LAUNCH / "xla_flags").read_text().splitlines() if not line.startswith("#")]


def test_every_flag_has_a_reason_and_stands_once():
    assert all(len(row) == 4 and row[0] in ("tpu", "cuda") for row in FLAGS)
    names = [(kind, value.partition("=")[0]) for kind, _, value, _ in FLAGS]
    assert len(set(names)) == len(names)


def shell(command, **environment):
    script = f"set -euo pipefail; source launch/environment.sh; {command}"
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


def test_a_flag_of_the_users_own_comes_last():
    flags = shell("xla_flags cuda; echo $XLA_FLAGS", XLA_FLAGS="--own=1").split()
    assert flags[-1] == "--own=1"
    assert set(flags[:-1]) == {value for kind, name, value, _ in FLAGS if (kind, name) == ("cuda", "XLA_FLAGS")}
    assert (
        shell("xla_flags cuda; echo $XLA_PYTHON_CLIENT_MEM_FRACTION", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5") == "0.5\n"
    )


def test_the_compiler_knows_every_gpu_flag():
    flags = " ".join(value for _, name, value, _ in FLAGS if name == "XLA_FLAGS")
    code = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_compiler_knows_every_tpu_flag():
    flags = " ".join(value for _, name, value, _ in FLAGS if name == "LIBTPU_INIT_ARGS")
    code = "from vgjax import topology; topology.environment(); print(len(topology.find('v5e:2x2').devices))"
    for asked, knows in ((flags, True), (flags + " --xla_tpu_no_such_flag=true", False)):
        environment = os.environ | {"LIBTPU_INIT_ARGS": asked}
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert (ran.returncode == 0 and "nknown command line flag" not in ran.stderr) == knows, ran.stderr


# A stand-in for a training: what process 0 does at its n-th start is told by argument n.
MODULE = """
import os, pathlib, signal, sys, time
folder, *acts = sys.argv[1:]
own = os.environ["VGJAX_PROCESS"]
(pathlib.Path(folder) / f"{own}-{os.getpid()}").write_text("")
start = len(list(pathlib.Path(folder).glob(f"{own}-*")))
act = acts[start - 1] if own == "0" else "wait"
print(f"start {start} of {os.environ['VGJAX_PROCESSES']}", flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if act == "done":
    (pathlib.Path(folder) / "done").write_text("")
elif act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif act != "wait":
    sys.exit(int(act))
while not (pathlib.Path(folder) / "done").exists():
    time.sleep(0.02)
"""


@pytest.fixture
def local(tmp_path):
    (tmp_path / "standin.py").write_text(MODULE)
    (tmp_path / "runs").mkdir()

    def start(*acts, **options):
        flags = ["--grace=0.2", *(f"--{name}={value}" for name, value in options.items())]
        command = [sys.executable, LAUNCH / "local.py", *flags, "2", "standin", tmp_path / "runs", *acts]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.mark.parametrize("first", [str(HUNG), str(LOADER), "kill"])
def test_a_local_job_starts_all_processes_again_where_it_may_help(local, first):
    job = local(first, "done")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    assert said.count("starting all again") == 1
    assert "[0] start 2 of 2" in said and "[1] start 2 of 2" in said


def test_a_local_job_ends_all_processes_on_bad_input(local):
    job = local(str(USER))
    said, _ = job.communicate(timeout=60)
    assert job.returncode == USER
    assert "starting all again" not in said


def test_a_local_job_gives_up_after_its_restarts(local):
    job = local(*[str(HUNG)] * 3, restarts=1)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == HUNG
    assert said.count("starting all again") == 1


def test_a_local_job_passes_sigterm_on_and_says_that_it_was_preempted(local):
    job = local("wait")
    said = [job.stdout.readline() for _ in range(2)]
    assert {line[:3] for line in said} == {"[0]", "[1]"}
    time.sleep(0.2)  # the handler is set after the line
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == PREEMPTED
