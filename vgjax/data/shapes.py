"""The embedded closed world: coloured shapes that move on a plain background, rendered and described by us.

    world = get("small");  scene, text = world.sample(rng, "train");  video = render(scene, frames=17, size=(32, 32))
    python -m vgjax.data.shapes --world small --count 2000 --split train --out DIR

Everything is relative (time in [0, 1], places in parts of the frame, diameters in parts of its shorter side), so one
scene can be rendered at any length and resolution. Objects stay inside the frame and never touch, so that what a clip
shows can be decided by rule (`vgjax.metrics.prompt`). A tenth of the (colour, shape, motion) combinations and a tenth
of the captions are never trained on.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8

from vgjax.data import captions
from vgjax.data.captions import Grammar, Request, Thing
from vgjax.data.video import write_mp4
from vgjax.errors import UserError, door
from vgjax.typing import Json

RGB = {
    "red": (220, 35, 35),
    "green": (35, 165, 60),
    "blue": (50, 85, 235),
    "yellow": (240, 210, 40),
    "magenta": (215, 60, 205),
    "cyan": (50, 205, 220),
    "black": (8, 8, 8),
    "white": (246, 246, 246),
    "gray": (128, 128, 128),
    "navy": (25, 25, 100),
}
Pose = tuple[float, float, float]  # y, x, diameter
Ranges = dict[str, tuple[float, float]]
SPLITS = ("train", "val", "novel")
HELD_OUT = 10  # one combination in so many is never trained on
MARGIN = 0.04  # between an object and the frame's edge
GAP = 0.07  # between the areas that two objects sweep
# The share of scenes with two objects, in a world where there may be two. Which of them does what is the last thing
# that a model learns, and only pairs teach it.
PAIRS = {"train": 2 / 3, "val": 1 / 2, "novel": 1 / 2}
# Diameter, travel, smaller diameter and growth factor of an object, alone or one of two: two are as large as the frame
# lets them be. At 32 pixels a shape below seven pixels can no longer be told from another.
ALONE = {"size": (0.42, 0.54), "travel": (0.20, 0.30), "small": (0.30, 0.35), "factor": (1.6, 1.9)}
PAIRED = {"size": (0.33, 0.39), "travel": (0.16, 0.22), "small": (0.27, 0.31), "factor": (1.5, 1.65)}
AXES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (y, x)

# Distance to the outline of a shape of radius 1 around its centroid, negative inside (exact near the edges).
# Circle and square have the same area, so that size tells nothing about shape.
OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda y, x: np.hypot(y, x) - 1,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) - np.sqrt(np.pi) / 2,
    "triangle": lambda y, x: np.maximum(y, np.sqrt(0.75) * abs(x) - y / 2) - 0.54,
    "diamond": lambda y, x: (abs(y) + abs(x) - 1.1) * np.sqrt(0.5),
    "cross": lambda y, x: np.maximum(np.maximum(abs(y), abs(x)) - 1, np.minimum(abs(y), abs(x)) - 0.34),
}


@dataclass(frozen=True)
class Object:
    """A thing on a straight path: `start` and `end` are (y, x, diameter) in parts of the frame."""

    color: str
    shape: str
    motion: str
    start: Pose
    end: Pose


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it."""

    background: str
    objects: tuple[Object, ...]

    @property
    def request(self) -> Request:
        """What the scene shows, in the words of a caption."""
        return Request(tuple(Thing(o.color, o.shape, o.motion) for o in self.objects), self.background)


@dataclass(frozen=True)
class World:
    """What may be seen: names from `RGB`, `OUTLINES` and `captions.MOTIONS`; `size` (h, w) and `frames` as written."""

    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    motions: tuple[str, ...]
    backgrounds: tuple[str, ...]
    max_objects: int = 1
    size: tuple[int, int] = (32, 32)
    frames: int = 17
    fps: float | int = 8

    def __post_init__(self) -> None:
        known = {"colors": RGB, "shapes": OUTLINES, "motions": captions.MOTIONS, "backgrounds": RGB}
        for field, names in known.items():
            object.__setattr__(self, field, tuple(getattr(self, field)))
            bad = sorted(set(getattr(self, field)) - set(names))
            if bad or not getattr(self, field):
                raise UserError(f"world.{field}: {', '.join(bad) or 'empty'}; choose from {', '.join(names)}")
        object.__setattr__(self, "size", tuple(self.size))
        both = sorted(set(self.colors) & set(self.backgrounds))
        if both:
            raise UserError(f"world.backgrounds: {', '.join(both)} is an object's colour too and would hide it")
        if not 1 <= self.max_objects <= min(2, len(self.colors)):
            raise UserError(f"world.max_objects is {self.max_objects}: 1, or 2 with at least two colours")
        if self.frames < 1 or min(self.size) < 8 or self.fps <= 0:
            raise UserError(f"world: {self.frames} frames of {self.size} at {self.fps} fps; at least 1 of (8, 8)")

    @property
    def combinations(self) -> tuple[Thing, ...]:
        """Every (colour, shape, motion)."""
        return tuple(itertools.starmap(Thing, itertools.product(self.colors, self.shapes, self.motions)))

    def held_out_combinations(self) -> tuple[Thing, ...]:
        """The tenth that is never trained on: spread evenly over colours, shapes, motions and their pairs."""
        return _held_out(self.combinations)

    def parse(self, caption: str) -> Request:
        """What a caption asks for in this world; UserError where it can't be read or asks for too many objects."""
        request = Grammar(self.colors, self.shapes, self.motions, self.backgrounds).parse(caption)
        if len(request.things) > self.max_objects:
            raise UserError(f"{caption!r} asks for {len(request.things)} objects; this world has {self.max_objects}")
        return request

    def sample(self, rng: np.random.Generator, split: str = "train") -> tuple[Scene, str]:
        """A scene and its caption: `train`, `val` (trained combinations, reserved captions) or `novel` (at least one
        combination that is never trained on)."""
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; choose from {', '.join(SPLITS)}")
        while True:
            scene = self._scene(rng, split)
            for _ in range(50):  # a scene has dozens of captions, a tenth of them reserved
                text = captions.caption(scene.request, rng)
                if split == "novel" or captions.split(text) == split:
                    return scene, text

    def _scene(self, rng: np.random.Generator, split: str) -> Scene:
        held_out = self.held_out_combinations()
        trained = sorted(set(self.combinations) - set(held_out))
        if split == "novel" and not held_out:
            raise UserError(f"a world of {len(trained)} combinations holds none out; split novel needs at least 6")
        things = [_pick(held_out if split == "novel" else trained, rng)]
        if self.max_objects > 1 and rng.random() < PAIRS[split]:
            things.append(_pick([c for c in trained if c.color != things[0].color], rng))
        paths = _paths([c.motion for c in things], rng)
        objects = tuple(Object(*c, *path) for c, path in zip(things, paths, strict=True))
        return Scene(str(rng.choice(self.backgrounds)), objects)


WORLDS = {
    "small": World(
        ("red", "green", "blue", "yellow"), ("circle", "square"), ("left", "right", "up", "down"), ("black", "white")
    ),
    "full": World(
        ("red", "green", "blue", "yellow", "magenta", "cyan"),
        # No cross: at 32 pixels its arms are one latent wide, and 40,000 steps did not teach a small model to draw one.
        ("circle", "square", "triangle", "diamond"),
        ("left", "right", "up", "down", "stays", "grows", "shrinks"),
        ("black", "white", "gray", "navy"),
        max_objects=2,
    ),
}


def get(name: str, **changes: Any) -> World:
    """A named world, with fields changed."""
    if name not in WORLDS:
        raise UserError(f"there is no world {name!r}; choose from {', '.join(WORLDS)}")
    unknown = sorted(set(changes) - {f.name for f in dataclasses.fields(World)})
    if unknown:
        raise UserError(f"a world has no {', '.join(unknown)}")
    return dataclasses.replace(WORLDS[name], **changes)


def coverage(
    shape: str,
    y: Float[np.ndarray, "*t"],
    x: Float[np.ndarray, "*t"],
    radius: Float[np.ndarray, "*t"],
    size: tuple[int, int],
) -> Float[np.ndarray, "*t h w"]:
    """How much of each pixel a shape covers, in [0, 1]; centre and radius in pixels, one per frame."""
    h, w = size
    y, x, radius = (a.astype(np.float32)[..., None, None] for a in (y, x, radius))
    radius = np.maximum(radius, 1e-3)
    rows = (np.arange(h, dtype=np.float32)[:, None] + 0.5 - y) / radius
    columns = (np.arange(w, dtype=np.float32) + 0.5 - x) / radius
    return np.clip(0.5 - OUTLINES[shape](rows, columns) * radius, 0, 1).astype(np.float32)


def render(scene: Scene, frames: int, size: tuple[int, int]) -> UInt8[np.ndarray, "t h w 3"]:
    """The scene as an anti-aliased video; a single frame shows its start."""
    h, w = size
    time = np.linspace(0, 1, frames)[:, None]
    video = np.empty((frames, h, w, 3), np.float32)
    video[:] = RGB[scene.background]
    for o in scene.objects:
        y, x, diameter = rearrange((1 - time) * o.start + time * o.end, "t k -> k t")
        alpha = coverage(o.shape, y * h, x * w, diameter * min(h, w) / 2, size)[..., None]
        video += alpha * (np.array(RGB[o.color], np.float32) - video)
    return np.round(video).astype(np.uint8)


def write(world: World, folder: Path | str, count: int, split: str = "train", seed: int = 0) -> Path:
    """Writes `count` H.264 clips with `captions.jsonl` and `world.json`; does nothing where exactly that already lies.

    A folder appears whole or not at all. UserError if it holds something else or can't be written.
    """
    folder = Path(folder)
    if count < 1:
        raise UserError(f"cannot write {count} clips: ask for at least one")
    geometry = {"alone": ALONE, "paired": PAIRED, "pairs": PAIRS, "margin": MARGIN, "gap": GAP}
    recipe = {"world": dataclasses.asdict(world), "count": count, "split": split, "seed": seed, "geometry": geometry}
    recipe = json.loads(json.dumps(recipe))
    try:
        if folder.exists() and any(folder.iterdir()):
            _check_same(folder, recipe)
            return folder
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        clip = functools.partial(_write_clip, world, part, split, seed)
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            rows = list(pool.map(clip, range(count)))
        (part / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (part / "world.json").write_text(json.dumps(recipe, indent=1) + "\n")
        part.replace(folder)
    except OSError as error:
        raise UserError(f"cannot write the shapes to {folder}: {error}") from error
    return folder


def _write_clip(world: World, folder: Path, split: str, seed: int, index: int) -> Json:
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene, text = world.sample(rng, split)
    name = f"{index:06d}.mp4"
    video = render(scene, world.frames, world.size)
    # Whole chroma: at 32 pixels 4:2:0 costs 16 dB on coloured edges (31 dB against 47, same file size).
    write_mp4(folder / name, video, float(world.fps), crf=10, pixel_format="yuv444p")
    return {"video": name, "caption": text, "scene": dataclasses.asdict(scene)}


def _check_same(folder: Path, recipe: Json) -> None:
    try:
        there = json.loads((folder / "world.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{folder} holds something that is not a written world: choose another folder") from None
    if there != recipe:
        changed = ", ".join(key for key in recipe if there.get(key) != recipe[key])
        raise UserError(f"{folder} holds shapes written with another {changed}: delete it or choose another folder")


@functools.cache
def _held_out(combinations: tuple[Thing, ...]) -> tuple[Thing, ...]:
    """Greedy: next is the combination whose pairs, then parts, were taken least; ties by a stable hash."""
    taken: Counter[tuple[int, object]] = Counter()
    left = sorted(combinations, key=lambda c: hashlib.blake2b(" ".join(c).encode()).digest())
    chosen = []

    def pairs(c: Thing) -> list[tuple[int, object]]:
        return list(enumerate(itertools.combinations(c, 2), len(c)))

    def crowding(c: Thing) -> tuple[int, int]:
        return sum(taken[pair] for pair in pairs(c)), sum(taken[part] for part in enumerate(c))

    for _ in range(round(len(combinations) / HELD_OUT)):
        best = min(left, key=crowding)
        left.remove(best)
        taken.update([*enumerate(best), *pairs(best)])
        chosen.append(best)
    return tuple(chosen)


def _pick(things: Sequence[Thing], rng: np.random.Generator) -> Thing:
    return things[rng.integers(len(things))]


def _paths(motions: Sequence[str], rng: np.random.Generator) -> list[tuple[Pose, Pose]]:
    """A (start, end) for each motion; the boxes that two objects sweep are set apart along one axis."""
    while True:
        moves = [_move(motion, ALONE if len(motions) == 1 else PAIRED, rng) for motion in motions]
        boxes = np.array([abs(shift) + sizes.max() for sizes, shift in moves])
        low = rng.uniform(MARGIN, 1 - MARGIN - boxes)
        slack = 1 - 2 * MARGIN - GAP - boxes.sum(axis=0)
        fits = np.flatnonzero(slack > 0)
        if len(moves) > 1 and not len(fits):
            continue  # two that grow can be too large together
        if len(moves) > 1:
            axis, (first, second) = rng.choice(fits), rng.permutation(2)
            room = np.sort(rng.uniform(0, slack[axis], 2))
            low[first, axis] = MARGIN + room[0]
            low[second, axis] = MARGIN + boxes[first, axis] + GAP + room[1]
        return [_path(*move, corner) for move, corner in zip(moves, low, strict=True)]


def _path(sizes: np.ndarray, shift: np.ndarray, low: np.ndarray) -> tuple[Pose, Pose]:
    start = low + sizes.max() / 2 - np.minimum(shift, 0)
    return tuple(map(float, (*start, sizes[0]))), tuple(map(float, (*(start + shift), sizes[1])))


def _move(motion: str, ranges: Ranges, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Diameters at start and end; displacement (y, x)."""
    sizes = np.repeat(rng.uniform(*ranges["size"]), 2)
    if motion in ("grows", "shrinks"):
        small = rng.uniform(*ranges["small"])
        sizes = np.array([small, small * rng.uniform(*ranges["factor"])])[:: 1 if motion == "grows" else -1]
    return sizes, np.array(AXES.get(motion, (0, 0))) * rng.uniform(*ranges["travel"])


@door
def main(argv: list[str]) -> None:
    """Writes a world from the command line."""
    parser = argparse.ArgumentParser(prog="python -m vgjax.data.shapes", description=main.__doc__)
    parser.add_argument("--world", default="small", choices=WORLDS)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    args = parser.parse_args(argv[1:])
    print(write(get(args.world), args.out, args.count, args.split, args.seed))


if __name__ == "__main__":
    main()
