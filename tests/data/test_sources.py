"""Sources: what a folder holds, what it skips and why, and latents that are whole or not there."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

from vgjax.data.decode import Unreadable
from vgjax.data.sources import Clip, Folder, Latents, LatentWriter, summary
from vgjax.errors import UserError


def image(path, level=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(path)


def test_captions_come_from_the_lines_and_from_text_files(tmp_path):
    image(tmp_path / "b.png", 10)
    image(tmp_path / "a.png", 20)
    image(tmp_path / "sub" / "c.webp", 30)
    image(tmp_path / ".half.png", 40)
    lines = ['{"video": "b.png", "caption": " from line ", "seed": 3}', "", '{"video": "b.png", "caption": "again"}']
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    (tmp_path / "a.txt").write_text("from text\n")
    (tmp_path / "sub" / "c.txt").write_text("élan", encoding="utf-8")
    source = Folder(tmp_path)
    loaded = [source.load(i, Clip(1, (4, 4)), None) for i in range(len(source))]
    assert [caption for _, caption in loaded] == ["from line", "again", "from text", "élan"]
    assert [int(video.mean()) for video, _ in loaded[:3]] == [10, 10, 20]
    assert source.skipped == [] and source.kind == "video"
    assert all(source.name(i).startswith(str(tmp_path)) for i in range(4))


def test_what_cannot_be_used_is_skipped_with_the_reason(tmp_path):
    for name in ("good.png", "mute.png", "empty.png", "binary.png"):
        image(tmp_path / name)
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "captions.jsonl").write_text('{"video": "gone.mp4", "caption": "x"}\n')
    source = Folder(tmp_path)
    assert len(source) == 1
    reasons = {bad.file.rsplit("/")[-1]: bad.reason for bad in source.skipped}
    assert reasons.keys() == {"gone.mp4", "mute.png", "empty.png", "binary.png"}
    assert "no such file" in reasons["gone.mp4"] and reasons["mute.png"] == "no caption"


def test_linked_clips_and_folders_are_found_once_and_loops_end(tmp_path):
    image(tmp_path / "store" / "a.png")
    image(tmp_path / "store" / "deep" / "b.png")
    home = tmp_path / "home"
    image(home / "own" / "c.png")
    (home / "linked").symlink_to(tmp_path / "store")
    (home / "own" / "again").symlink_to(tmp_path / "store")
    (home / "own" / "loop").symlink_to(home)
    (home / "d.png").symlink_to(tmp_path / "store" / "a.png")
    (home / "gone.png").symlink_to(tmp_path / "nowhere.png")
    lines = [f'{{"video": "{name}", "caption": "x"}}\n' for name in ("own/again/a.png", "linked/deep/b.png", "d.png")]
    (home / "captions.jsonl").write_text("".join(lines))
    (home / "own" / "c.txt").write_text("c")
    source = Folder(home)
    names = [source.name(i).removeprefix(f"{home}/") for i in range(len(source))]
    assert names == ["own/again/a.png", "linked/deep/b.png", "d.png", "own/c.png"]
    assert [source.load(i, Clip(1, (4, 4)), None)[0].mean() for i in range(4)] == [100] * 4
    assert [bad.file for bad in source.skipped] == [str(home / "gone.png")]


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "sub/../../a.png"])
def test_a_name_outside_of_the_folder_is_refused(tmp_path, name):
    image(tmp_path / "clips" / "a.png")
    (tmp_path / "clips" / "captions.jsonl").write_text(json.dumps({"video": name, "caption": "x"}))
    with pytest.raises(UserError, match=r"captions\.jsonl:1: .*inside this folder"):
        Folder(tmp_path / "clips")


def test_a_summary_says_what_was_found_and_skipped_and_why(tmp_path):
    for name in ("a.png", "b.png", "c.mp4", "mute.png", "dumb.png"):
        image(tmp_path / "x.png")
        (tmp_path / "x.png").rename(tmp_path / name)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    assert summary(Folder(tmp_path)) == f"{tmp_path}: 1 clip, 2 images; 2 skipped: no caption"
    written(tmp_path / "set")
    assert summary(Latents(tmp_path / "set")) == f"{tmp_path / 'set'}: 5 latents"


@pytest.mark.parametrize(
    "line",
    [
        b"{broken",
        b'{"video": "a.png"}',
        b'{"caption": "a"}',
        b'["a.png", "b"]',
        b'{"video": 3, "caption": "x"}',
        b"\xff\xfe",
    ],
)
def test_a_broken_captions_line_is_named_by_file_and_number(tmp_path, line):
    image(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_bytes(b'{"video": "a.png", "caption": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=r"captions\.jsonl:2: expected one"):
        Folder(tmp_path)


def test_useless_folders_are_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no videos or images"):
        Folder(tmp_path)
    image(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"none of 1 files can be used; the first, .*a\.png: no caption"):
        Folder(tmp_path)


def written(path, count=5):
    latents = np.random.default_rng(0).normal(size=(count, 2, 3, 4, 5)).astype(np.float32)
    with LatentWriter(path, {"config": {"dim": 8}}) as writer:
        for i, latent in enumerate(latents):
            writer.add(latent, f"caption é {i}", 10 + i)
    return latents


def test_latents_come_back_bit_for_bit_with_captions_and_meta(tmp_path):
    latents = written(tmp_path / "set")
    source = pickle.loads(pickle.dumps(Latents(tmp_path / "set")))
    assert len(source) == 5 and source.kind == "latent"
    assert source.meta == {"meta": {"config": {"dim": 8}}, "shape": [2, 3, 4, 5], "count": 5}
    for i in (3, 0, 4):
        latent, caption = source.load(i)
        assert np.array_equal(latent, latents[i]) and latent.dtype == np.float32 and caption == f"caption é {i}"


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), LatentWriter(tmp_path / "set", {}) as writer:
        writer.add(np.zeros((1, 1, 1, 1), np.float32), "a", 0)
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no finished set of latents"):
        Latents(tmp_path / "set")


def test_latents_are_not_mixed_overwritten_or_empty(tmp_path):
    written(tmp_path / "set")
    with pytest.raises(UserError, match="already there"):
        LatentWriter(tmp_path / "set", {})
    with pytest.raises(UserError, match="one shape"), LatentWriter(tmp_path / "other", {}) as writer:
        writer.add(np.zeros((1, 1, 1, 1), np.float32), "a", 0)
        writer.add(np.zeros((1, 1, 1, 2), np.float32), "b", 1)
    with pytest.raises(UserError, match="not one latent"), LatentWriter(tmp_path / "empty", {}):
        pass
    with pytest.raises(UserError, match="can't be written here"), LatentWriter("/proc/nowhere/set", {}):
        pass


def test_damaged_latents_are_noticed(tmp_path):
    latents = written(tmp_path / "set", 40)
    path = tmp_path / "set" / "latents.array_record"
    data, rng = path.read_bytes(), np.random.default_rng(1)
    at = data.index(latents[7].tobytes()[:16])
    broken = bytearray(data)
    broken[at + int(rng.integers(400))] ^= 4
    path.write_bytes(broken)
    with pytest.raises(Unreadable, match="damaged"):
        Latents(tmp_path / "set").load(7)
    assert np.array_equal(Latents(tmp_path / "set").load(8)[0], latents[8])
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="no finished set of latents"):
        Latents(tmp_path / "set")
    path.write_bytes(data)
    meta = json.loads((tmp_path / "set" / "meta.json").read_text())
    (tmp_path / "set" / "meta.json").write_text(json.dumps(meta | {"count": 41}))
    with pytest.raises(UserError, match="promises 41 latents, the file holds 40"):
        Latents(tmp_path / "set")
