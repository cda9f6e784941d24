"""The judge must believe true renders, also degraded ones, and nothing else."""

import numpy as np
import pytest
from scipy import ndimage

from vgjax.data.captions import Request, Thing
from vgjax.data.shapes import RGB, WORLDS, Object, Scene, render
from vgjax.errors import UserError
from vgjax.metrics.prompt import ATTRIBUTES, accuracy, score

FULL = WORLDS["full"]
SMALL = WORLDS["small"]
RED_LEFT = Request((Thing("red", "circle", "left"),), "black")


def clips(world, count, frames, size, seed=0):
    rng = np.random.default_rng(seed)
    scenes, texts = zip(*[world.sample(rng) for _ in range(count)], strict=True)
    return [render(scene, frames, (size, size)) for scene in scenes], list(texts)


def degraded(videos, sigma, noise, seed=0):
    rng = np.random.default_rng(seed)
    for video in videos:
        soft = ndimage.gaussian_filter(video.astype(np.float32), (0, sigma, sigma, 0))
        yield np.clip(np.round(soft + rng.normal(0, noise, video.shape)), 0, 255).astype(np.uint8)


def going(color="red", shape="circle", motion="left", start=(0.5, 0.7, 0.4), end=(0.5, 0.3, 0.4)):
    return Object(color, shape, motion, start, end)


def show(*objects, background="black", frames=17):
    return render(Scene(background, objects), frames, (32, 32))


def draw(alpha, color="red", background="black"):
    ground, paint = np.array(RGB[background]), np.array(RGB[color])
    return np.round(ground + alpha[..., None] * (paint - ground)).astype(np.uint8)


@pytest.mark.parametrize(("count", "frames", "size"), [(300, 17, 32), (150, 9, 32), (40, 17, 64), (4, 33, 128)])
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_true_renders_are_believed(world, count, frames, size):
    assert accuracy(*clips(world, count, frames, size), world)["all"] >= 0.99


@pytest.mark.parametrize(("sigma", "noise", "least"), [(0.6, 6, 0.98), (0.9, 10, 0.93)], ids=["31dB", "26dB"])
@pytest.mark.parametrize(("count", "frames"), [(200, 9), (60, 17)])
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_blur_and_noise_of_a_decoder_are_forgiven(world, count, frames, sigma, noise, least):
    videos, texts = clips(world, count, frames, 32)
    assert accuracy(degraded(videos, sigma, noise), texts, world)["all"] >= least


def test_a_colour_cast_is_forgiven():
    videos, texts = clips(FULL, 100, 9, 32)
    cast = [np.clip(v * 0.9 + np.array([8, 0, 12]), 0, 255).astype(np.uint8) for v in videos]
    assert accuracy(cast, texts, FULL)["all"] >= 0.95


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_captions_of_other_clips_are_rarely_right(world):
    videos, texts = clips(world, 200, 5, 32, seed=1)
    result = accuracy(videos, texts[1:] + texts[:1], world)
    chance = 1 / len(world.colors) / len(world.shapes) / len(world.motions)
    assert result["all"] <= chance + 0.04
    if world is SMALL:
        assert abs(result["color"] - 1 / 4) < 0.1 and abs(result["motion"] - 1 / 4) < 0.1
        assert abs(result["shape"] - 1 / 2) < 0.1 and result["count"] == 1


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (show(going("magenta")), {"color"}),
        (show(going(shape="square")), {"shape"}),
        (show(going(start=(0.5, 0.3, 0.4), end=(0.5, 0.7, 0.4))), {"motion"}),
        (show(going(end=(0.5, 0.7, 0.4))), {"motion"}),
        (show(going(start=(0.7, 0.7, 0.4), end=(0.3, 0.3, 0.4))), {"motion"}),
        (show(going(start=(0.5, 0.7, 0.25), end=(0.5, 0.3, 0.5))), {"motion"}),
        (show(going(), background="white"), {"background"}),
        (show(), {"color", "shape", "motion", "count"}),
    ],
    ids=["colour", "shape", "right", "still", "diagonal", "grows", "background", "empty"],
)
def test_each_mistake_is_named_and_nothing_else(wrong, names):
    assert all(score(show(going()), RED_LEFT, FULL).values())
    result = score(wrong, RED_LEFT, FULL)
    assert {name for name in ATTRIBUTES if not result[name]} == names | {"all"}


def test_a_second_object_is_counted():
    high = going(start=(0.25, 0.7, 0.3), end=(0.25, 0.3, 0.3))
    low = going("blue", "diamond", start=(0.75, 0.7, 0.3), end=(0.75, 0.3, 0.3))
    assert not score(show(high, low), RED_LEFT, FULL)["all"]
    both = Request((Thing("blue", "diamond", "left"), Thing("red", "circle", "left")))
    assert score(show(high, low), both, FULL)["all"]
    assert not score(show(high), both, FULL)["color"] and not score(show(high), both, FULL)["count"]
    swapped = Request((Thing("blue", "circle", "left"), Thing("red", "diamond", "left")))
    assert not score(show(high, low), swapped, FULL)["all"]


def test_an_object_that_changes_midway_is_refused():
    circle = show(going())
    for other, name in ((show(going("yellow")), "color"), (show(going(shape="square")), "shape")):
        changed = np.concatenate([circle[:9], other[9:]])
        for frame in (circle, other):
            thing = Thing("yellow" if name == "color" and frame is other else "red",
                          "square" if name == "shape" and frame is other else "circle", "left")  # fmt: skip
            result = score(changed, Request((thing,)), FULL)
            assert not result[name] and result["motion"]


def test_a_way_that_jumps_or_waves_and_an_object_that_vanishes_are_refused():
    video = show(going(start=(0.5, 0.75, 0.3), end=(0.5, 0.25, 0.3)))
    jumps = np.concatenate([np.repeat(video[:1], 9, 0), np.repeat(video[-1:], 8, 0)])
    vanishes = np.concatenate([video[:10], np.repeat(show()[:1], 7, 0)])
    shuffled = video[np.random.default_rng(0).permutation(17)]
    waves = [going(start=(0.5 + 0.13 * np.sin(0.8 * i), 0.75 - i / 32, 0.3)) for i in range(17)]
    waves = np.concatenate([show(o, frames=1) for o in waves])
    for bad in (jumps, vanishes, shuffled, waves):
        assert not score(bad, RED_LEFT, FULL)["motion"]


def test_blobs_are_no_shapes():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:32, :32] + 0.5
    x = x + np.linspace(6, -6, 9)[:, None, None]  # all go left
    blobs = [np.clip(0.5 - np.hypot(y - 16, (x - 16) / 2) + 4, 0, 1), 1.0 * (np.hypot(y - 16, x - 16) < 7) * (y < 16)]
    for _ in range(30):
        field = ndimage.gaussian_filter(rng.normal(size=(9, 32, 32)), (1, 2, 2)) * np.exp(-np.hypot(y - 16, x - 16) / 8)
        blobs.append(np.clip(8 * field / abs(field).max() - 1, 0, 1))
    for alpha in blobs:
        for shape in FULL.shapes:
            assert not score(draw(alpha), Request((Thing("red", shape, "left"),)), FULL)["shape"]


def test_any_clip_can_be_judged():
    rng = np.random.default_rng(0)
    with np.errstate(all="raise"):
        for t, h, w in ((1, 8, 8), (2, 9, 31), (5, 32, 32)):
            noise = rng.integers(0, 256, (t, h, w, 3), dtype=np.uint8)
            for video in (noise, noise // 8, np.zeros_like(noise), np.full_like(noise, 255)):
                assert not score(video, RED_LEFT, FULL)["all"]


def test_one_image_shows_an_object_that_stays():
    still = Request((Thing("red", "circle", "stays"),))
    assert score(show(going(), frames=1), still, FULL)["all"]


def test_accuracy_refuses_what_it_cannot_read():
    with pytest.raises(UserError, match="purple"):
        accuracy([show(going())], ["a purple circle moves left"], FULL)
    with pytest.raises(UserError, match="at least one caption"):
        accuracy([], [], FULL)
