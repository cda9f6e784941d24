import itertools
import json
from collections import Counter

import av
import numpy as np
import pytest
from einops import reduce

from vgjax.data import captions, shapes
from vgjax.data.shapes import RGB, WORLDS, Object, Scene, World, render
from vgjax.errors import UserError

STILL = Object("red", "circle", "stays", (0.5, 0.5, 0.4), (0.5, 0.5, 0.4))
TINY = World(("red",), ("circle",), ("up",), ("black",))
worlds = pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)


def test_a_circle_has_the_area_and_colours_it_should():
    video = render(Scene("black", (STILL,)), 3, (64, 64))
    assert video.shape == (3, 64, 64, 3) and video.dtype == np.uint8
    assert tuple(video[0, 32, 32]) == RGB["red"] and tuple(video[0, 0, 0]) == RGB["black"]
    share = (video[1, ..., 0].astype(float) - RGB["black"][0]) / (RGB["red"][0] - RGB["black"][0])
    assert share.sum() == pytest.approx(np.pi * 12.8**2, rel=0.01)


@worlds
def test_neighbouring_resolutions_show_the_same_scene(world):
    rng = np.random.default_rng(1)
    for _ in range(10):
        scene, _ = world.sample(rng)
        small = render(scene, 9, (32, 32)).astype(float)
        large = render(scene, 17, (64, 64))[::2].astype(float)
        pooled = reduce(large, "t (h i) (w j) c -> t h w c", "mean", i=2, j=2)
        assert abs(pooled - small).mean() < 2


@worlds
def test_objects_stay_inside_the_frame_and_never_touch(world):
    rng = np.random.default_rng(2)
    for _ in range(150):
        scene, _ = world.sample(rng)
        alone = [render(Scene("black", (o,)), 17, (64, 64)).max(-1) > RGB["black"][0] for o in scene.objects]
        for mask in alone:
            assert mask.any((1, 2)).all() and not mask[:, [0, -1]].any() and not mask[:, :, [0, -1]].any()
        for one, other in itertools.combinations(alone, 2):
            assert not (one.any(0) & other.any(0)).any(), "not even at different times"


@worlds
def test_a_clip_of_one_frame_renders(world):
    scene, _ = world.sample(np.random.default_rng(0))
    assert render(scene, 1, (40, 24)).shape == (1, 40, 24, 3)


@worlds
def test_held_out_combinations_are_a_tenth_and_leave_every_pair_in_training(world):
    held_out = world.held_out_combinations()
    assert len(set(held_out)) == round(len(world.combinations) / 10)
    trained = set(world.combinations) - set(held_out)
    for names in itertools.combinations(range(3), 2):
        pairs = [{tuple(c[i] for i in names) for c in some} for some in (trained, world.combinations)]
        assert pairs[0] == pairs[1]
    for part in range(3):
        counts = Counter(c[part] for c in held_out)
        assert max(counts.values()) - min(counts.values()) <= 2


def test_held_out_combinations_never_change():
    assert [" ".join(c) for c in WORLDS["small"].held_out_combinations()] == [
        "red square left", "blue circle down", "yellow circle up"
    ]  # fmt: skip


@worlds
def test_splits_keep_their_promises(world):
    held_out = set(world.held_out_combinations())
    rng = np.random.default_rng(3)
    seen = set()
    for split in shapes.SPLITS:
        for _ in range(300):
            scene, text = world.sample(rng, split)
            things = set(scene.request.things)
            assert bool(things & held_out) == (split == "novel")
            assert split == "novel" or captions.split(text) == split
            seen |= things
    assert len(seen) > 0.9 * len(world.combinations)


def test_full_world_shows_one_or_two_objects_of_different_colours():
    rng = np.random.default_rng(4)
    for split, share in shapes.PAIRS.items():
        scenes = [WORLDS["full"].sample(rng, split)[0] for _ in range(200)]
        assert abs(np.mean([len(s.objects) == 2 for s in scenes]) - share) < 0.1
        assert all(len({o.color for o in s.objects}) == len(s.objects) for s in scenes)


def read(path):
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_written_clips_come_back_nearly_lossless_with_their_captions(tmp_path):
    world = shapes.get("full", frames=9)
    folder = shapes.write(world, tmp_path / "clips", 6, "val", seed=1)
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        objects = [o | {"start": tuple(o["start"]), "end": tuple(o["end"])} for o in row["scene"]["objects"]]
        scene = Scene(row["scene"]["background"], tuple(Object(**o) for o in objects))
        truth = render(scene, 9, (32, 32)).astype(float)
        error = np.mean((read(folder / row["video"]) - truth) ** 2)
        assert 10 * np.log10(255**2 / error) > 38
        assert captions.split(row["caption"]) == "val"
        assert (folder / row["video"]).stat().st_size < 10_000


def test_writing_twice_is_writing_once_and_other_parameters_are_refused(tmp_path):
    world = shapes.get("small", frames=5)
    folder = shapes.write(world, tmp_path / "clips", 2)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert shapes.write(world, folder, 2) == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    with pytest.raises(UserError, match="another count, seed"):
        shapes.write(world, folder, 3, seed=5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match="not a written world"):
        shapes.write(world, tmp_path / "mine", 2)


def test_an_interrupted_write_leaves_no_folder_and_is_repeated_whole(tmp_path, monkeypatch):
    world = shapes.get("small", frames=5)
    whole = shapes.write(world, tmp_path / "whole", 3)
    real, done = shapes.write_mp4, []

    def dies(path, *args, **kwargs):
        done.append(path)
        if len(done) == 2:
            raise KeyboardInterrupt
        real(path, *args, **kwargs)

    monkeypatch.setattr(shapes, "write_mp4", dies)
    with pytest.raises(KeyboardInterrupt):
        shapes.write(world, tmp_path / "cut", 3)
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(shapes, "write_mp4", real)
    cut = shapes.write(world, tmp_path / "cut", 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]
    for path in whole.iterdir():
        assert (cut / path.name).read_bytes() == path.read_bytes()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the shapes to .*file"):
        shapes.write(WORLDS["small"], tmp_path / "file" / "clips", 1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: shapes.get("tiny"), "no world 'tiny'; choose from small, full"),
        (lambda: shapes.get("small", colours=("red",)), "a world has no colours"),
        (lambda: shapes.get("small", colors=("red", "mauve")), "world.colors: mauve; choose from red"),
        (lambda: shapes.get("small", motions=()), "world.motions: empty"),
        (lambda: shapes.get("small", backgrounds=("red",)), "red is an object's colour too"),
        (lambda: shapes.get("small", max_objects=3), "world.max_objects is 3"),
        (lambda: shapes.get("small", frames=0), "0 frames"),
        (lambda: WORLDS["small"].sample(np.random.default_rng(0), "test"), "choose from train, val, novel"),
        (lambda: WORLDS["small"].parse("a red circle moves left and a blue box rises"), "asks for 2 objects"),
        (lambda: TINY.sample(np.random.default_rng(0), "novel"), "none out"),
    ],
)
def test_bad_worlds_get_one_clear_sentence(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_the_command_writes_a_folder(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        shapes.main(["shapes", "--world", "small", "--count", "1", "--out", str(tmp_path / "clips")])
    assert exit_.value.code == 0 and (tmp_path / "clips" / "000000.mp4").exists()
    with pytest.raises(SystemExit) as exit_:
        shapes.main(["shapes", "--world", "small", "--count", "2", "--out", str(tmp_path / "clips")])
    assert exit_.value.code == 2 and "another count" in capsys.readouterr().err
