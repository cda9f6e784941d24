"""Checkpoints come back bit for bit, or say what is wrong; a newer damaged one never hides an older good one."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from vgjax.data import storage
from vgjax.errors import StorageError, UserError
from vgjax.parallel import distributed
from vgjax.training import checkpoint
from vgjax.training.checkpoint import Checkpoints, digest, load
from vgjax.typing import PyTree

META = {"config": {"name": "tiny", "optim": {"lr": 1e-3}}, "data": {"seed": 1, "step": 7, "samples": 224}}


@struct.dataclass
class State:
    step: PyTree
    params: PyTree
    opt: PyTree
    ema: PyTree
    key: PyTree


def state(step: int = 1, width: int = 8) -> State:
    params = {
        "block": {"kernel": jax.random.normal(jax.random.key(step), (16, width)), "bias": jnp.arange(width) / 3},
        "half": jnp.full((4,), 1 / 3, jnp.bfloat16),
    }
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init(params)
    ema = jax.tree.map(lambda x: x / 7, params)
    return State(jnp.int32(step), params, opt, ema, jax.random.key_data(jax.random.key(step)))


def abstract(tree: PyTree, sharding=None) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), tree)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory) -> Path:
    """A directory with the good steps 1 and 2, to be copied, not changed."""
    root = tmp_path_factory.mktemp("two")
    saver = Checkpoints(root)
    for step in (1, 2):
        saver.save(step, state(step), META)
    saver.finish()
    return root


@pytest.fixture
def copy(two_steps, tmp_path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "copy"))


def restored(root: Path) -> int:
    """Restores the newest good step, sees that it is bit-identical to what was saved, and names it."""
    tree, meta, step = Checkpoints(root).restore(abstract(state()))
    assert digest(tree) == digest(state(step))
    assert meta["data"] == META["data"] and meta["step"] == step
    return step


def test_state_comes_back_bit_for_bit_with_its_structure_and_meta(copy):
    tree, meta, step = Checkpoints(copy).restore(abstract(state()))
    assert step == 2 and Checkpoints(copy).steps() == [1, 2] and Checkpoints(copy).latest() == 2
    assert jax.tree.structure(tree) == jax.tree.structure(state())
    assert digest(tree) == digest(state(2)) != digest(state(1))
    assert meta["config"] == META["config"] and meta["versions"]["jax"] == jax.__version__
    assert Checkpoints(copy).restore(abstract(state()), step=1)[2] == 1


def test_digest_sees_one_bit_a_dtype_a_shape_and_a_name():
    tree = {"a": np.zeros((2, 3), np.float32)}
    bit = {"a": tree["a"].copy()}
    bit["a"].view(np.uint8)[0, 0] ^= 1
    others = [bit, {"a": np.zeros((2, 3), np.int32)}, {"a": np.zeros((3, 2), np.float32)}, {"b": tree["a"]}]
    assert len({digest(other) for other in [tree, *others]}) == 5
    assert digest(tree) == digest({"a": jnp.zeros((2, 3))})


def test_the_digest_of_what_lies_in_other_processes_is_that_of_the_whole(monkeypatch):
    """Large leaves are never whole on a process: no more than `GATHERED` bytes of one, or a row."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    value = np.arange(16 * 8, dtype=np.float32).reshape(16, 8) * -1.0  # with a -0.0
    tree = {
        str(spec): jax.device_put(value.astype(kind), NamedSharding(mesh, PartitionSpec(*spec)))
        for spec, kind in {("fsdp", "data"): "float32", (None, "fsdp"): "bfloat16", ("data",): "int8"}.items()
    }
    expected, sizes = digest(tree), []
    monkeypatch.setattr(distributed, "_near", lambda leaf: False)
    monkeypatch.setattr(distributed, "GATHERED", 100)
    join = lambda part, is_source: sizes.append(part.nbytes) or part  # noqa: E731
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", join)
    assert digest(tree) == expected and max(sizes) <= 100


def test_sharded_state_is_restored_onto_other_meshes_and_onto_one_device(tmp_path):
    meshes = [jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2) for shape in ((2, 4), (8, 1))]
    value = jnp.arange(64.0 * 8).reshape(64, 8)
    first = {"w": jax.device_put(value, NamedSharding(meshes[0], PartitionSpec("fsdp", "data"))), "b": jnp.ones(3)}
    saver = Checkpoints(tmp_path)
    saver.save(5, first, {}, wait=True)
    targets = [
        NamedSharding(meshes[1], PartitionSpec("data")),
        NamedSharding(meshes[0], PartitionSpec(None, "fsdp")),
        SingleDeviceSharding(jax.devices()[3]),
    ]
    for target in targets:
        wanted = {
            "w": jax.ShapeDtypeStruct((64, 8), jnp.float32, sharding=target),
            "b": jax.ShapeDtypeStruct((3,), jnp.float32),
        }
        tree, _, _ = saver.restore(wanted)
        assert tree["w"].sharding == target
        assert digest(tree) == digest(first)


def test_state_donated_right_after_the_call_is_saved_as_it_was(tmp_path):
    tree = {str(i): jax.random.normal(jax.random.key(i), (1000, 300)) for i in range(4)}
    before = digest(tree)
    wanted = abstract(tree)
    overwrite = jax.jit(lambda t: jax.tree.map(lambda x: x * 0 - 7, t), donate_argnums=0)
    saver = Checkpoints(tmp_path)
    saver.save(1, tree, {})
    for _ in range(3):
        tree = overwrite(tree)
    jax.block_until_ready(tree)
    assert digest(saver.restore(wanted)[0]) == before


@pytest.mark.parametrize("seed", range(40))
def test_one_flipped_bit_is_noticed_and_the_older_step_used(seed, copy, capsys):
    rng = random.Random(seed)
    victims = [path for path in files(copy / "00000002") if path.stat().st_size]
    victim = victims[seed % len(victims)]
    data = bytearray(victim.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    victim.write_bytes(data)
    assert restored(copy) == 1
    told = capsys.readouterr().err
    assert victim.name in told and "damaged" in told
    assert victim.name in {path.name for path in files(copy / "damaged" / "00000002")}  # kept, and out of the way
    assert Checkpoints(copy).steps() == [1]


def test_every_single_bit_of_the_manifest_matters(copy):
    folder = copy / "00000002"
    raw = (folder / storage.MANIFEST).read_bytes()
    for bit in range(0, 8 * len(raw), 31):
        data = bytearray(raw)
        data[bit // 8] ^= 1 << bit % 8
        (folder / storage.MANIFEST).write_bytes(data)
        assert storage.sealed(folder) is None, f"bit {bit}"


@pytest.mark.parametrize("how", ["cut", "grown", "deleted"])
def test_a_cut_grown_or_deleted_file_is_noticed_whichever_it_is(how, copy, two_steps, capsys):
    for victim in [path.relative_to(two_steps) for path in files(two_steps / "00000002")]:
        shutil.rmtree(copy)
        shutil.copytree(two_steps, copy)
        data = (copy / victim).read_bytes()
        if how == "cut" and not data:
            continue
        (copy / victim).write_bytes(data[:-1] if how == "cut" else data + b"x")
        if how == "deleted":
            (copy / victim).unlink()
        assert restored(copy) == 1, victim
        assert victim.name in capsys.readouterr().err


def test_with_no_good_step_left_nothing_is_moved_and_every_fault_is_named(copy):
    for step in ("00000001", "00000002"):
        (copy / step / checkpoint.META).unlink()
    for _ in range(2):  # a restart must not find an empty directory and begin anew
        with pytest.raises(StorageError, match=r"00000002 is damaged: meta.json is missing; .*00000001 is damaged"):
            Checkpoints(copy).restore(abstract(state()))
    assert Checkpoints(copy).steps() == [1, 2]
    with pytest.raises(StorageError, match="no checkpoint of step 9"):
        Checkpoints(copy).restore(abstract(state()), step=9)


def test_a_step_damaged_twice_is_set_aside_twice(copy):
    for _ in range(2):
        (copy / "00000002" / checkpoint.META).write_text("{}")
        assert restored(copy) == 1
        Checkpoints(copy).save(2, state(2), META, wait=True)
    assert restored(copy) == 2
    assert sorted(path.name for path in (copy / "damaged").iterdir()) == ["00000002", "00000002-1"]


def test_a_step_saved_again_replaces_the_old_one(copy):
    saver = Checkpoints(copy)
    saver.save(2, state(3), META, wait=True)
    assert digest(saver.restore(abstract(state()))[0]) == digest(state(3))
    assert sorted(path.name for path in copy.iterdir()) == ["00000001", "00000002"]


KILLED = """
import sys, time
import jax
from vgjax.training import checkpoint
real = checkpoint.seal
def seal(folder):
    if "00000002" in folder.name:
        if sys.argv[2] == "after": real(folder)
        print("now", flush=True)
        time.sleep(60)
    real(folder)
checkpoint.seal = seal
saver = checkpoint.Checkpoints(sys.argv[1])
for step in (1, 2):
    saver.save(step, {"w": jax.numpy.full((64, 64), step)}, {}, wait=True)
"""


@pytest.mark.parametrize(("moment", "newest"), [("before", 1), ("after", 2)])
def test_sigkill_around_the_manifest_costs_at_most_the_step_in_flight(moment, newest, tmp_path, capsys):
    """Before the manifest the step never was; after it the step is complete though it has not got its name yet."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), moment], stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[2], env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert process.stdout.readline().strip() == "now"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000001", "00000002.unfinished"]
    saver = Checkpoints(tmp_path)
    tree, _, step = saver.restore({"w": jax.ShapeDtypeStruct((64, 64), jnp.int32)})
    assert step == newest and (tree["w"] == newest).all()
    assert not list(tmp_path.glob("*.unfinished")) and not (tmp_path / "damaged").exists()
    told = capsys.readouterr().err
    assert ("killed before it was complete" in told) == (moment == "before") and "damaged" not in told


def test_leaves_that_are_missing_extra_or_of_another_shape_or_dtype_are_refused_by_name(copy):
    saver, good = Checkpoints(copy), abstract(state())

    def refuse(change, *words):
        params = {**good.params, "block": dict(good.params["block"])}
        change(params)
        with pytest.raises(UserError) as caught:
            saver.restore(good.replace(params=params))
        assert all(word in str(caught.value) for word in words), caught.value

    def leaf(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    refuse(lambda p: p["block"].update(gate=leaf(8)), "params/block/gate", "missing in the checkpoint", "float32[8]")
    refuse(lambda p: p["block"].pop("bias"), "params/block/bias", "float32[8] in the checkpoint", "missing in this run")
    refuse(lambda p: p["block"].update(kernel=leaf(16, 9)), "params/block/kernel", "float32[16, 8]", "float32[16, 9]")
    refuse(lambda p: p["block"].update(bias=leaf(8, dtype=jnp.bfloat16)), "params/block/bias", "float32[8]", "bfloat16")
    assert saver.steps() == [1, 2]  # a config that does not fit is no damage


def test_a_state_that_comes_in_pieces_is_the_state(tmp_path):
    whole = {"a": {"b": jnp.arange(6.0), "c": jnp.ones((2, 3), jnp.bfloat16)}, "d": {"e": jnp.arange(3)}}
    pieces = [{"a": {"c": whole["a"]["c"]}}, {"d": whole["d"]}, {"a": {"b": whole["a"]["b"]}}]
    saver = Checkpoints(tmp_path, keep_last=1)
    saver.save(1, whole, META)
    saver.stream(2, iter(pieces), META)
    assert saver.steps() == [2] and sorted(path.name for path in tmp_path.iterdir()) == ["00000002"]
    tree, meta, step = saver.restore(abstract(whole))
    assert digest(tree) == digest(whole) and step == 2 and meta["config"] == META["config"]
    assert digest(load(tmp_path, "a")[0]) == digest(whole["a"])
    stored, read, _ = checkpoint.opened(tmp_path, "a")
    assert stored["c"].shape == (2, 3) and digest({"c": read("c")}) == digest({"c": whole["a"]["c"]})


def test_pieces_that_cannot_be_made_or_written_leave_older_steps(copy):
    saver, big = Checkpoints(copy, keep_last=1), jax.random.normal(jax.random.key(0), (256, 256))

    def unreadable():
        yield {"w": jnp.ones(3)}
        raise UserError("the source is gone")

    with pytest.raises(UserError, match="the source is gone"):
        saver.stream(3, unreadable(), {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(StorageError, match="step 3 was not saved to .*; the steps saved before it are untouched"):
            saver.stream(3, iter([{"w": big}, {"v": big}]), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saver.steps() == [1, 2] and not list(copy.glob("*.unfinished"))
    saver.stream(3, iter([{"w": big}, {"v": big}]), {})
    assert saver.steps() == [3]


def test_keep_last_and_keep_every_decide_what_stays(tmp_path):
    saver = Checkpoints(tmp_path, keep_last=2, keep_every=30)
    for step in range(10, 80, 10):
        saver.save(step, {"w": jnp.ones(2)}, {})
    saver.finish()
    assert saver.steps() == [30, 60, 70]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000030", "00000060", "00000070"]


def test_a_full_disk_fails_the_next_call_and_leaves_older_steps(copy, caplog):
    """The kernel refuses to write past the limit, as it does on a full disk, in whatever library the write happens."""
    saver = Checkpoints(copy, keep_last=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"w": jax.random.normal(jax.random.key(0), (256, 256))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        saver.save(3, big, {})
        with pytest.raises(StorageError, match="step 3 was not saved to .*; the steps saved before it are untouched"):
            saver.save(4, big, {})
        assert not caplog.records  # of Orbax, which would print the same with three tracebacks
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert saver.steps() == [1, 2] and not list(copy.glob("*.unfinished"))
    saver.save(4, state(4), META, wait=True)  # once there is room again, saving goes on
    assert saver.steps() == [4]


@pytest.mark.parametrize("call", ["finish", "save", "restore"])
def test_a_background_failure_surfaces_at_the_next_call(call, copy, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    saver = Checkpoints(copy, keep_last=1)
    monkeypatch.setattr(storage, "replace", full)
    saver.save(3, state(3), META)
    calls = {
        "finish": saver.finish,
        "save": lambda: saver.save(4, state(4), META),
        "restore": lambda: saver.restore(abstract(state())),
    }
    with pytest.raises(StorageError, match="step 3 was not saved to .*No space left on device"):
        calls[call]()
    assert saver.steps() == [1, 2]
    saver.finish()  # told once


def test_the_error_in_flight_is_not_replaced_by_that_of_a_save(copy, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "seal", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk is full")))
    with pytest.raises(UserError, match="the first"), Checkpoints(copy) as saver:
        saver.save(3, state(3), META)
        raise UserError("the first")
    assert "step 3 was not saved" in capsys.readouterr().err
    with pytest.raises(StorageError, match="step 3 was not saved"), Checkpoints(copy) as saver:
        saver.save(3, state(3), META)


def test_in_a_job_one_process_verifies_a_step_once_and_tells_the_others(copy, monkeypatch):
    said, verified, real = [], [], checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda folder: verified.append(folder.name) or real(folder))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda x: said.append(np.array(x)) or x)
    (copy / "00000002" / "state" / "manifest.ocdbt").unlink(missing_ok=True)
    (copy / "00000002" / checkpoint.META).write_text("{}")
    assert [checkpoint.newest(copy).name for _ in range(2)] == ["00000001"] * 2
    assert verified == ["00000002", "00000001"]
    with pytest.raises(StorageError, match="meta.json has 2 bytes"):
        checkpoint.newest(copy / "00000002")
    told = iter(said)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", lambda _: next(told))
    monkeypatch.setattr(checkpoint, "verify", None)
    assert [checkpoint.newest(copy).name for _ in range(2)] == ["00000001"] * 2
    with pytest.raises(StorageError, match="meta.json has 2 bytes"):
        checkpoint.newest(copy / "00000002")


def test_a_directory_that_cannot_be_written_is_told_with_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write to .*file/checkpoints: Not a directory"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_load_needs_no_structure_and_reads_only_what_is_asked_for(two_steps, tmp_path):
    workdir = tmp_path / "workdir"
    shutil.copytree(two_steps, workdir / checkpoint.SUBDIR)
    for path in (workdir, workdir / checkpoint.SUBDIR, workdir / checkpoint.SUBDIR / "00000002"):
        tree, meta, step = load(path, "ema")
        assert digest(tree) == digest(state(2).ema) and step == 2 and meta["config"] == META["config"]
    both, _, _ = load(workdir, ["ema", "params"])
    assert sorted(both) == ["ema", "params"]
    whole, _, step = load(workdir / checkpoint.SUBDIR / "00000001")
    assert digest(whole) == digest(state(1)) and step == 1


def test_workdir_is_found_from_everything_that_load_accepts(two_steps, tmp_path):
    """By what lies there, whatever the folders above are called."""
    shelf = tmp_path / checkpoint.SUBDIR
    for run in (tmp_path / "run", shelf / "run", shelf / checkpoint.SUBDIR / checkpoint.SUBDIR):
        steps = Path(shutil.copytree(two_steps, run / checkpoint.SUBDIR))
        shutil.copytree(steps / "00000002", steps / "damaged" / "00000002-1")
        for path in (run, steps, steps / "00000002", steps / "damaged" / "00000002-1"):
            assert checkpoint.workdir_of(path) == run
            assert checkpoint.meta(path)["step"] == load(path, "ema")[2] == 2
    elsewhere = Path(shutil.copytree(two_steps, tmp_path / "elsewhere"))
    assert checkpoint.workdir_of(elsewhere / "00000002") == elsewhere / "00000002"
    assert checkpoint.workdir_of(elsewhere) == elsewhere
    with pytest.raises(UserError, match="holds no vgjax checkpoint"):
        checkpoint.meta(shelf / "run" / checkpoint.SUBDIR / "damaged")


def test_load_of_a_damaged_newest_step_takes_the_older_one_and_moves_nothing(copy, capsys):
    (copy / "00000002" / checkpoint.META).write_text("{}")
    assert load(copy, "ema")[2] == 1
    assert "meta.json has 2 bytes instead of" in capsys.readouterr().err
    assert checkpoint.meta(copy)["step"] == 1  # weights and config are of one step
    assert (copy / "00000002").exists()
    with pytest.raises(StorageError, match="meta.json has 2 bytes"):
        load(copy / "00000002", "ema")


def test_load_says_in_one_sentence_what_is_there_instead(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign" / "model").mkdir(parents=True)
    (tmp_path / "foreign" / "config.yaml").write_text("")
    (tmp_path / "unfinished" / "00000003.unfinished").mkdir(parents=True)
    (copy / "00000002" / storage.MANIFEST).unlink()
    wrong = {
        tmp_path / "absent": "no checkpoint at .*absent: it does not exist",
        tmp_path / "foreign" / "config.yaml": "it is a file",
        tmp_path / "empty": r"no vgjax checkpoint \(it is empty\); give a training workdir",
        tmp_path / "foreign": r"no vgjax checkpoint \(config.yaml, model\)",
        tmp_path / "unfinished": "holds only an unfinished save",
        copy / "00000002": "manifest.json is missing",
    }
    for path, sentence in wrong.items():
        with pytest.raises(UserError, match=sentence) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no emma; it has ema, key, opt, params, step"):
        load(copy / "00000001", "emma")


def test_meta_that_is_no_json_fails_at_the_call_and_not_later(tmp_path):
    saver = Checkpoints(tmp_path)
    with pytest.raises(TypeError):
        saver.save(1, state(), {"config": object()})
    assert saver.steps() == [] and not list(tmp_path.iterdir())
