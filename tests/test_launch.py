"""The launchers are sound shell and YAML, restart on the documented exit codes, and pass a stop on."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jsonschema
import kubernetes_validate
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


JOBSET = {  # what stands around the jobs; their own schema is that of Kubernetes
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer"},
                        "rules": {
                            "items": {
                                "additionalProperties": False,
                                "required": ["action", "name"],
                                "properties": {
                                    "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                                    "action": {
                                        "enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
                                    },
                                    "onJobFailureReasons": {"items": {"type": "string"}},
                                },
                            }
                        },
                    },
                },
                "replicatedJobs": {
                    "items": {
                        "additionalProperties": False,
                        "required": ["name", "template"],
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer"},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    }
                },
            },
        },
    },
}


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_the_jobset_keeps_to_the_schemas(jobset):
    jsonschema.validate(jobset, JOBSET)
    (job,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": jobset["metadata"], **job["template"]}
    kubernetes_validate.validate(job, "1.31", strict=True)
    job["spec"]["template"]["spec"]["terminationGracePeriod"] = 120
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_the_jobset_restarts_all_but_what_a_restart_cannot_mend(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    of_job = job["template"]["spec"]
    assert of_job["parallelism"] == of_job["completions"]
    (rule,) = of_job["podFailurePolicy"]["rules"]
    pod = of_job["template"]["spec"]
    (container,) = pod["containers"]
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
    code = "from vgjax.planner import topology; topology.environment(); print(len(topology.find('v5e:2x2').devices))"
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
while len(list(pathlib.Path(folder).glob(f"{1 - int(own)}-*"))) < start:
    time.sleep(0.02)
act = acts[start - 1] if own == "0" else "wait"
print(f"start {start} of {os.environ['VGJAX_PROCESSES']}", flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
if act == "done":
    (pathlib.Path(folder) / "done").write_text("")
elif act == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
elif "," in act:  # what it says of itself, and what it ends with
    pathlib.Path(os.environ["VGJAX_FAILURE"]).write_text(act.split(",")[0])
    sys.exit(int(act.split(",")[1]))
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


def test_the_first_failure_says_how_a_job_ended_though_another_process_ends_before(tmp_path):
    """Process 1 fails by bad input and has last words; process 0, which lost it, ends before it."""
    sys.path.insert(0, str(LAUNCH))
    from local import run

    script = (
        "import os, time\nfrom vgjax import errors\nown = int(os.environ['VGJAX_PROCESS'])\n"
        "failure = os.environ['VGJAX_FAILURE']\nwhile not own and not os.path.exists(failure): time.sleep(0.01)\n"
        "errors.record((6, 2)[own])\ntime.sleep(0.3 * own)\nos._exit((6, 2)[own])"
    )
    assert run(2, [sys.executable, "-c", script], [], 5.0) == USER


@pytest.mark.parametrize(
    ("first", "ended", "starts", "code", "again"),
    [
        (2, 137, 0, 2, False),
        (6, 137, 0, 6, True),
        ("", 137, 0, 137, True),
        (6, 6, 20, 6, False),
        (75, 75, 99, 75, True),
    ],
)
def test_a_slurm_job_is_requeued_by_its_first_failure_and_not_for_ever(tmp_path, first, ended, starts, code, again):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "environment.sh").write_text("install() { :; }")
    failed = f"printf %s {first} >$VGJAX_FAILURE\n" if first else ""
    for name, script in {"srun": f"{failed}exit {ended}", "scontrol": "echo requeued"}.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    own = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(starts), "SLURM_SUBMIT_DIR": str(tmp_path)}
    environment = os.environ | own | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ran = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "m"], env=environment, capture_output=True, text=True)
    assert ran.returncode == code and ("requeued" in ran.stdout) == again, ran.stderr
    assert not list(tmp_path.glob(".failure*"))


def test_a_local_job_passes_sigterm_on_and_says_that_it_was_preempted(local):
    job = local("wait")
    said = [job.stdout.readline() for _ in range(2)]
    assert {line[:3] for line in said} == {"[0]", "[1]"}
    time.sleep(0.2)  # the handler is set after the line
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == PREEMPTED


# Two hosts on this machine: each has a home of its own; a shell on all ends with the first host that fails.
GCLOUD = """#!/usr/bin/env bash
[ "$4" = ssh ] || exit 0
command="${*: -1}"
for i in 0 1; do
  mkdir -p "$HOSTS/$i"
  HOME="$HOSTS/$i" VGJAX_PROCESS=$i VGJAX_PROCESSES=2 bash -c "${command#--command=}" &
done
wait -n && wait -n
"""
GIT = """#!/usr/bin/env bash
case $1 in
  rev-parse) echo "$COMMIT" ;;
  archive) tar -czf "/tmp/vgjax-$COMMIT.tar.gz" --transform "s,^,vgjax-$COMMIT/," launch pyproject.toml ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
    """Starts launch/tpu_vm.sh on two stand-ins for hosts, on which vgjax is installed."""
    for name, script in {"gcloud": GCLOUD, "git": GIT, "venv/bin/activate": "", "python": ""}.items():
        file = tmp_path / ("bin/" * ("/" not in name) + name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(script or f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
        file.chmod(0o755)
    (tmp_path / "venv/bin/activate").write_text("")
    (tmp_path / "venv/bin/python").symlink_to(tmp_path / "bin/python")
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()[:16]
    for kind in ("cpu", "cuda", "tpu"):
        (tmp_path / f"venv/.vgjax-{kind}-{digest}").touch()
    (tmp_path / "standin.py").write_text(MODULE)
    (tmp_path / "runs").mkdir()
    commit = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    own = {"TPU": "pod", "ZONE": "zone", "PAUSE": "0", "HOSTS": str(tmp_path / "hosts"), "COMMIT": commit}
    own |= {"VGJAX_VENV": str(tmp_path / "venv"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    own |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def start(*acts):
        command = ["bash", LAUNCH / "tpu_vm.sh", "standin", tmp_path / "runs", *acts]
        return subprocess.Popen(
            command, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    yield start
    (tmp_path / "runs" / "done").touch()  # whoever still waits ends
    Path(f"/tmp/vgjax-{commit}.tar.gz").unlink(missing_ok=True)


def test_a_pod_is_started_again_on_all_hosts_and_none_lives_twice(pod, tmp_path):
    job = pod("kill", "done")
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 0, said
    assert said.count("starting all hosts again") == 1 and said.count("start 2 of 2") == 2
    assert len(list((tmp_path / "runs").glob("[01]-*"))) == 4
    alive = [Path(f"/proc/{file.name[2:]}/cmdline") for file in (tmp_path / "runs").glob("[01]-*")]
    assert not [file for file in alive if file.exists() and file.read_bytes()]  # one that nobody waits for has no words


def test_a_pod_ends_with_the_code_of_its_first_failure_and_starts_again_only_where_that_helps(pod, tmp_path):
    job = pod("5,137", "2,137")
    assert job.wait(60) == 2
    (tmp_path / "runs" / "done").touch()  # the other host still waits
    said = job.stdout.read()
    assert said.count("starting all hosts again") == 1 and "ended with 5" in said, said


def test_a_pod_hears_sigterm_on_all_hosts_and_is_not_started_again(pod):
    job = pod("wait")
    said = [job.stdout.readline() for _ in range(2)]
    assert all("start 1 of 2" in line for line in said), said
    time.sleep(0.2)  # the handler is set after the line
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == PREEMPTED
    assert "again" not in job.stdout.read()


def test_every_dependency_has_a_lower_bound_that_can_be_installed_alone():
    sys.path.insert(0, str(LAUNCH))
    from lowest import constraints

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = constraints(project)
    names = {re.match(r"[\w-]+", one)[0] for one in project["dependencies"]}
    names |= {re.match(r"[\w-]+", one)[0] for some in project["optional-dependencies"].values() for one in some}
    assert names - {"torch"} == {line.partition("==")[0] for line in found}  # torch is pinned
    assert "jax==0.10" in found and len(found) == len(names) - 1
