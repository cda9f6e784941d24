"""The stream: a batch is a function of (seed, step); bad files are named and replaced; nothing ever hangs."""

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from vgjax.data import transforms
from vgjax.data.decode import Unreadable
from vgjax.data.pipeline import _pids, batches, examples
from vgjax.data.sources import Bad, Folder, Latents, LatentWriter
from vgjax.data.text import Bytes, Learned
from vgjax.data.transforms import BadFiles
from vgjax.data.video import write_mp4
from vgjax.errors import LoaderError, UserError
from vgjax.typing import Context, Tokens

OPTIONS = {
    "seed": 3,
    "batch": 4,
    "conditioner": Learned(Bytes(8)),
    "drop_caption": 0.25,
    "frames": 3,
    "size": (16, 16),
    "fps": 8,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven clips; the grey of a pixel says which clip (30 k), frame (2 t) and, by a ramp, where the crop lies."""
    path = tmp_path_factory.mktemp("clips")
    ramp = np.linspace(0, 8, 24)[:, None]
    for k in range(7):
        video = np.stack([np.broadcast_to(ramp + 30 * k + 2 * t, (16, 24, 3)) for t in range(8)])
        write_mp4(path / f"{k}.mp4", video.astype(np.uint8), 8, crf=4)
        (path / f"{k}.txt").write_text(f"clip {k}")
    return path


def take(stream, count):
    """The next `count` batches; the stream is closed."""
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def worker_pids(stream, count):
    """Process ids of the workers, once all have started."""
    deadline = time.monotonic() + 60
    while len(pids := _pids(stream._stream.folder.name)) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return pids


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(map(np.array_equal, *map(jax.tree.leaves, (a, b))))


class Scripted:
    """A source that does what its test wants: fails for some records, or in some way."""

    kind, path = "latent", Path("scripted")

    def __init__(self, count=10, bad=(), act="", skipped=()):
        self.count, self.bad, self.act, self.skipped = count, bad, act, [Bad(file, "no caption") for file in skipped]

    def __len__(self):
        return self.count

    def name(self, record):
        return f"scripted/{record}"

    def load(self, record, clip, rng):
        if record in self.bad and self.act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif record in self.bad and self.act == "leave":
            os._exit(0)
        elif record in self.bad and self.act == "sleep":
            time.sleep(1000)
        elif record in self.bad and self.act == "odd":
            raise KeyError("odd")
        elif record in self.bad:
            raise Unreadable(f"record {record} is rotten")
        return np.full((1, 1, 1, 1), record, np.float32), f"{record}"


def test_a_batch_has_the_promised_keys_shapes_and_types(folder):
    (batch,) = take(batches(Folder(folder), **OPTIONS), 1)
    assert jax.tree.map(lambda v: (v.shape, v.dtype.name), batch) == {
        "video": ((4, 3, 16, 16, 3), "uint8"),
        "context": Context({"text": Tokens(((4, 8, 1), "int32"), ((4, 8), "bool"))}),
        "index": ((4,), "uint32"),
        "id": ((4,), "int32"),
    }


def test_batches_depend_on_seed_and_step_alone_not_on_workers_or_resuming(folder):
    source = Folder(folder)
    whole = take(batches(source, **OPTIONS), 9)
    assert same(take(batches(source, **OPTIONS, threads=4), 9), whole)
    assert not same(take(batches(source, **OPTIONS | {"seed": 4}), 9), whole)
    for start in (1, 4, 8):
        assert same(take(batches(source, **OPTIONS, start_step=start), 9 - start), whole[start:])
    for workers in (1, 2):
        assert same(take(batches(source, **OPTIONS, start_step=3, workers=workers), 6), whole[3:])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_rows_of_several_processes_and_batches_of_one_are_the_samples_of_the_whole(folder, count):
    whole = take(batches(Folder(folder), **OPTIONS, start_step=2), 3)
    parts = [take(batches(Folder(folder), **OPTIONS, start_step=2, rows=(i, i + count)), 3) for i in range(0, 4, count)]
    joined = [jax.tree.map(lambda *rows: np.concatenate(rows), *step) for step in zip(*parts, strict=True)]
    assert same(joined, whole)
    ones = take(batches(Folder(folder), **OPTIONS | {"batch": 1}, start_step=8), 12)
    assert same(ones, [jax.tree.map(lambda rows, i=i: rows[i : i + 1], batch) for batch in whole for i in range(4)])


def test_every_epoch_shows_every_record_once_in_another_order_with_other_windows_and_crops(folder):
    taken = take(batches(Folder(folder), **OPTIONS | {"batch": 7}), 12)
    ids = np.stack([batch["id"] for batch in taken])
    assert (np.sort(ids) == np.arange(7)).all()
    assert len(np.unique(ids, axis=0)) > 8
    assert np.array_equal(np.concatenate([batch["index"] for batch in taken]), np.arange(84, dtype=np.uint32))
    video, ids = np.concatenate([batch["video"] for batch in taken]).astype(float), ids.ravel()
    assert np.array_equal(np.clip((video.mean((1, 2, 3, 4)) - 9) / 30, 0, 6).round(), ids), "id names another clip"
    assert np.abs(np.diff(video.mean((2, 3, 4)), axis=1) - 2).max() < 1, "frames are not consecutive"
    places = np.unique((video[:, 0, :, 0].mean((1, 2)) - 30 * ids).round(1))
    assert len(places) > 10, "windows or crops never change"


def words(batch):
    return batch["context"].text["text"].mask.sum(1)


def test_captions_are_dropped_as_often_as_asked():
    texts = [
        batch["context"].text["text"].mask.sum(1) for batch in take(batches(Scripted(), **OPTIONS | {"batch": 100}), 20)
    ]
    assert 0.21 < np.mean(np.concatenate(texts) == 1) < 0.29
    for share, dropped in ((0.0, False), (1.0, True)):
        (batch,) = take(batches(Scripted(), **OPTIONS | {"drop_caption": share}), 1)
        assert ((words(batch) == 1) == dropped).all()


def test_latents_go_through_the_same_stream(tmp_path):
    latents = np.random.default_rng(0).normal(size=(6, 2, 3, 3, 4)).astype(np.float32)
    with LatentWriter(tmp_path / "set", {}) as writer:
        for i, latent in enumerate(latents):
            writer.add(latent, str(i), i)
    taken = take(
        batches(Latents(tmp_path / "set"), seed=0, batch=3, conditioner=Learned(Bytes(4)), drop_caption=0.0), 2
    )
    for batch in taken:
        assert np.array_equal(batch["latent"], latents[batch["id"]])
        assert np.array_equal(batch["context"].text["text"].c[:, 1, 0], batch["id"] + 2 + ord("0"))


def test_bad_records_are_replaced_the_same_way_each_time_and_listed_once(tmp_path):
    source = Scripted(10, bad=(2, 3), skipped=("scripted/mute",))
    stream = batches(source, **OPTIONS, bad_files=tmp_path / "run" / "bad_files.jsonl", max_bad=0.3)
    whole = take(stream, 10)
    ids = np.concatenate([batch["id"] for batch in whole])
    assert not {2, 3} & set(ids.tolist()) and np.bincount(ids)[4] == 12, "4 stands in for 2 and 3"
    assert np.array_equal(np.concatenate([batch["latent"] for batch in whole]).ravel(), ids)
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_files.jsonl").read_text().splitlines()]
    assert sorted((line["file"], line["reason"]) for line in lines) == [
        ("scripted/2", "record 2 is rotten"),
        ("scripted/3", "record 3 is rotten"),
        ("scripted/mute", "no caption"),
    ]
    assert stream.bad.count == 3 and stream.bad.share() == 3 / 11 and stream.bad.share(30) == 0.1
    assert same(take(batches(source, **OPTIONS, start_step=6, max_bad=1), 4), whole[6:])


def test_unreadable_files_of_a_folder_are_skipped_with_their_reasons(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "0.mp4").write_bytes(b"no video at all")
    write_mp4(tmp_path / "1.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
    (tmp_path / "2.txt").unlink()
    stream = batches(Folder(tmp_path), **OPTIONS, bad_files=tmp_path / "bad.jsonl", max_bad=0.5)
    take(stream, 6)
    assert {Path(file).name: reason for file, reason in stream.bad.entries().items()} == {
        "0.mp4": "can't be read: Invalid data found when processing input",
        "1.mp4": "too short: 3 frames at 8 fps needed, 2 available",
        "2.mp4": "no caption",
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_files_end_the_run_with_the_count_the_first_reason_and_the_list(tmp_path, workers):
    stream = batches(Scripted(10, bad=(4, 7)), **OPTIONS, bad_files=tmp_path / "bad.jsonl", workers=workers)
    said = (
        r"2 of 10 files are bad, more than the .* share of 0\.1; .* is scripted/(4|7): record . is rotten; .*bad\.jsonl"
    )
    with pytest.raises(UserError, match=said) as caught:
        take(stream, 20)
    assert caught.type is UserError, "a worker's UserError arrives as one"
    with pytest.raises(UserError, match="3 of 13 files are bad.*the first is b: no caption"):
        batches(Scripted(10, skipped="bcd"), **OPTIONS)
    with pytest.raises(UserError, match="not one of 3 records can be read"):
        take(batches(Scripted(3, bad=range(3)), **OPTIONS, max_bad=1), 1)


def test_the_list_of_bad_files_survives_many_writers_and_a_cut_off_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"file": "old", "reason": "r"}\n{"file": "cut", "rea')
    BadFiles(path).add("f0", "r0")
    assert BadFiles(path).entries() == {"old": "r", "f0": "r0"}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: BadFiles(path).add(f"f{i % 20}", f"r{i % 20}"), range(200)))
    assert BadFiles(path).count == 21 and len(path.read_text().splitlines()) == 22
    assert BadFiles(path, frozenset(["f1", "f2", "good", "fine"])).share() == 0.5
    with open(path, "rb") as held, ThreadPoolExecutor(1) as pool:
        fcntl.flock(held, fcntl.LOCK_EX)
        waiting = pool.submit(BadFiles(path).add, "late", "r")
        time.sleep(0.2)
        assert not waiting.done(), "another process is writing"
        fcntl.flock(held, fcntl.LOCK_UN)
        waiting.result(10)
    assert BadFiles(path).count == 22
    with pytest.raises(UserError, match="can't be written"):
        BadFiles("/proc/nowhere/bad.jsonl").add("a", "b")


def test_bad_files_of_other_settings_or_of_a_mended_folder_do_not_count(tmp_path):
    options = OPTIONS | {"bad_files": tmp_path / "bad.jsonl"}
    with pytest.raises(UserError, match="2 of 10 files are bad"):
        batches(Scripted(10, skipped=("scripted/1", "scripted/2")), **options)
    assert batches(Scripted(10), **options).bad.count == 0, "they have captions now"
    with pytest.raises(UserError, match="2 of 10 files are bad"):
        take(batches(Scripted(10, bad=(4, 7)), **options), 20)
    with pytest.raises(UserError, match="2 of 10 files are bad"):
        batches(Scripted(10), **options)
    stream = batches(Scripted(10), **options | {"frames": 2})
    assert stream.bad.count == 0 and len(take(stream, 5)) == 5
    (tmp_path / "bad.jsonl").write_text('{"file": "scripted/1", "reason": "before there were settings"}\n')
    assert batches(Scripted(10), **options).bad.count == 0


def test_listing_many_bad_files_reads_each_line_once(tmp_path, monkeypatch):
    read, parse = [], transforms._parse
    monkeypatch.setattr(transforms, "_parse", lambda text: (read.append(len(text)), parse(text))[1])
    bad = BadFiles(tmp_path / "bad.jsonl", frozenset(f"f{i}" for i in range(200)))
    for i in range(200):
        bad.add(f"f{i}", "r")
        bad.check(1)
    assert bad.count == 200 and sum(read) <= (tmp_path / "bad.jsonl").stat().st_size


@pytest.mark.parametrize(
    "change",
    [{"batch": 0}, {"workers": -1}, {"drop_caption": 1.5}, {"max_bad": -0.1}, {"seed": -1}, {"fps": 0}, {"frames": 0}],
)
def test_senseless_options_are_refused_by_name(change):
    (name,) = change
    with pytest.raises(UserError, match=f"{name}={change[name]}"):
        batches(Scripted(), **OPTIONS | change)


def test_a_killed_worker_is_replaced_and_no_batch_is_lost(folder):
    source = Folder(folder)
    whole = take(batches(source, **OPTIONS), 20)
    stream = batches(source, **OPTIONS, workers=2, timeout_s=60)
    got = [next(stream)]
    os.kill(worker_pids(stream, 2)[1], signal.SIGKILL)
    assert same(got + take(stream, 19), whole)
    assert stream.restarts == 1


@pytest.mark.parametrize("act", ["die", "leave"])
def test_a_record_that_kills_every_worker_ends_in_an_error_that_names_the_worker(act):
    stream = batches(Scripted(10, bad=(5,), act=act), **OPTIONS, workers=1, timeout_s=60)
    with pytest.raises(LoaderError, match=r"worker 0 \(process \d+\) died twice while loading batch"):
        take(stream, 10)


def test_a_stuck_worker_is_named_within_the_time_limit_and_killed(folder):
    stream = batches(Folder(folder), **OPTIONS, workers=2, timeout_s=60)
    next(stream)
    pids = worker_pids(stream, 2)
    os.kill(pids[1], signal.SIGSTOP)
    stream.timeout_s, start = 2, time.monotonic()
    with pytest.raises(LoaderError, match=rf"did not come from worker 1 \(process {pids[1]}\) within 2 s"):
        take(stream, 50)
    assert time.monotonic() - start < 20
    deadline = time.monotonic() + 10
    while {process.pid for process in multiprocessing.active_children()} & set(pids.values()):
        assert time.monotonic() < deadline, "the workers live on"
        time.sleep(0.1)


def test_a_record_that_never_comes_is_bad_and_replaced(tmp_path):
    stream = batches(Scripted(10, bad=(0,), act="sleep"), **OPTIONS, timeout_s=2)
    assert 0 not in np.concatenate([batch["id"] for batch in take(stream, 5)])
    assert stream.bad.entries() == {"scripted/0": "takes longer than 0.5 s to read"}
    again = batches(Scripted(10, bad=(0,), act="sleep"), **OPTIONS, timeout_s=0.04, bad_files=tmp_path / "bad.jsonl")
    assert again.bad.slow == set()
    BadFiles(tmp_path / "bad.jsonl", settings=again.bad.settings).add("scripted/0", "slow", "slow")
    again = batches(Scripted(10, bad=(0,), act="sleep"), **OPTIONS, timeout_s=4000, bad_files=tmp_path / "bad.jsonl")
    assert 0 not in np.concatenate([batch["id"] for batch in take(again, 5)]), "nobody waits for it again"
    (stuck,) = examples(Scripted(1, bad=(0,), act="sleep"), timeout_s=1)
    assert stuck.reason == "takes longer than 0.25 s to read"


def test_whatever_a_reader_raises_is_one_bad_record():
    stream = batches(Scripted(10, bad=(0,), act="odd"), **OPTIONS)
    assert 0 not in np.concatenate([batch["id"] for batch in take(stream, 5)])
    assert stream.bad.entries() == {"scripted/0": "can't be read: KeyError: 'odd'"}
    (odd,) = examples(Scripted(1, bad=(0,), act="odd"))
    assert odd.reason == "can't be read: KeyError: 'odd'"


def test_a_stuck_thread_ends_in_an_error_too():
    stream = batches(Scripted(10, bad=range(10), act="sleep"), **OPTIONS, timeout_s=1, max_bad=1)
    with pytest.raises(LoaderError, match="did not come from thread \d within 1 s"):
        take(stream, 10)


@pytest.mark.parametrize(
    ("workers", "last"), [(1, "os.kill(_pids(stream._stream.folder.name)[0], signal.SIGSTOP)"), (0, "next(stream)")]
)
def test_a_program_whose_loader_is_stuck_ends_by_itself(tmp_path, workers, last):
    """The interpreter would otherwise wait for a stopped child or a thread for ever."""
    (tmp_path / "program.py").write_text(
        "import os, signal, sys\n"
        "from vgjax.data.pipeline import _pids, batches\n"
        "from vgjax.data.text import Bytes, Learned\n"
        "from test_pipeline import Scripted\n"
        "if __name__ == '__main__':\n"
        "    source = Scripted(10, bad=(0,), act='sleep')\n"
        "    options = {'seed': 0, 'batch': 2, 'conditioner': Learned(Bytes(4)), 'drop_caption': 0}\n"
        f"    stream = batches(source, **options, workers={workers}, threads=2)\n"
        "    next(stream)\n"
        f"    {last}\n"
        "    sys.exit(7)\n"
    )
    roots = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    done = subprocess.run([sys.executable, tmp_path / "program.py"], env=os.environ | {"PYTHONPATH": roots}, timeout=60)
    assert done.returncode == 7


def test_examples_are_every_record_in_order_with_whole_captions_and_reasons(folder, tmp_path):
    first, second = (list(examples(Folder(folder), frames=3, size=(16, 16), fps=8, threads=n)) for n in (1, 3))
    assert [example.id for example in first] == list(range(7))
    assert [example.caption for example in first] == [f"clip {k}" for k in range(7)]
    assert all(np.array_equal(a.array, b.array) for a, b in zip(first, second, strict=True))
    middle = np.linspace(0, 8, 24)[4:20].astype(int).mean()
    for k, example in enumerate(first):
        assert np.abs(example.array.mean((1, 2, 3)) - [30 * k + 2 * t + middle for t in range(3)]).max() < 1.5
    odd = list(examples(Scripted(3, bad=(1,), skipped=("mute",))))
    assert [(e.id, e.file, e.reason) for e in odd] == [
        (-1, "mute", "no caption"),
        (0, "scripted/0", None),
        (1, "scripted/1", "record 1 is rotten"),
        (2, "scripted/2", None),
    ]
