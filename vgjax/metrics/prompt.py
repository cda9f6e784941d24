"""Does the clip show what its caption says? A rule-based judge of the closed world of `vgjax.data.shapes`.

    score(video, world.parse("a red circle moves left"), world)  -> {"color": True, "shape": True, ..., "all": True}

The background is the median of the frame's border. What differs from it, connected in space and time, is a tube: one
object on its way. Its colour is the nearest named one; its shape is the one whose render, at the tube's measured centre
and area, overlaps best; its motion is a line fitted to centre and size. Colour and shape must hold in most frames.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from einops import einsum, rearrange, reduce

from vgjax.data.captions import Request, Thing
from vgjax.data.shapes import OUTLINES, RGB, World, coverage
from vgjax.errors import UserError
from vgjax.typing import Bool, Float, UInt8

ATTRIBUTES = ("color", "shape", "motion", "count", "background", "all")
FOREGROUND = 40  # smallest distance from the background, in RGB levels; the world's colours are 100 and more away
TOLERANCE = 110  # largest distance of an object's colour from the one it is named after
SMALLEST = 0.008  # of the frame's area: anything smaller is dirt; the world's smallest object has 0.02
STEADY = 0.85  # the share of frames in which an object must be there, with its colour and shape
OVERLAP = 0.8  # smallest intersection over union of a tube with the shape it is named after
MOVED = 0.1  # of the frame: the world's objects travel 0.16 and more
GREW = np.log(1.3)  # of the diameter: the world's objects grow by 1.5 and more
JITTER = 0.05  # rms distance of the centre from its straight line, of the frame


@dataclass(frozen=True)
class Track:
    """What one object does: names by frame (None: not there or nothing known), and its motion (None: none known)."""

    colors: tuple[str | None, ...]
    shapes: tuple[str | None, ...]
    motion: str | None


def score(video: UInt8[np.ndarray, "t h w c"], request: Request, world: World) -> dict[str, bool]:
    """Whether a clip shows the requested colours, shapes, motions, number of objects and background, and all of it.

    Objects are matched to the request as favourably as possible. A background that is not asked for is always right.
    """
    frames = video.astype(np.float32)
    ground = _background(frames)
    tubes = _tubes(frames, ground)
    tracks = [_track(frames, ground, tubes == i, tubes > 0, world) for i in range(1, tubes.max() + 1)]
    right = _match(tracks, request.things)
    right["count"] = len(tracks) == len(request.things)
    seen = _nearest(np.median(ground, axis=0))
    right["background"] = request.background is None or seen == request.background
    return right | {"all": all(right.values())}


def accuracy(videos: Iterable[UInt8[np.ndarray, "t h w c"]], captions: Sequence[str], world: World) -> dict[str, float]:
    """The share of clips that are right, by attribute; UserError where a caption can't be read."""
    if not captions:
        raise UserError("prompt accuracy needs at least one caption")
    requests = [world.parse(text) for text in captions]
    scores = [score(video, request, world) for video, request in zip(videos, requests, strict=True)]
    return {name: float(np.mean([s[name] for s in scores])) for name in ATTRIBUTES}


def _background(frames: Float[np.ndarray, "t h w c"]) -> Float[np.ndarray, "t c"]:
    border = np.ones(frames.shape[1:3], bool)
    border[1:-1, 1:-1] = False
    return np.median(frames[:, border], axis=1)


def _tubes(frames: Float[np.ndarray, "t h w c"], ground: Float[np.ndarray, "t c"]) -> np.ndarray:
    """Labels 1, 2, ... from the largest tube down, 0 elsewhere."""
    from scipy import ndimage  # here: half a second, which a training that measures nothing need not wait

    away = np.linalg.norm(frames - rearrange(ground, "t c -> t 1 1 c"), axis=-1)
    t, h, w = away.shape
    enough = max(SMALLEST * h * w, 3)
    mask = away > FOREGROUND
    rough, count = ndimage.label(mask)
    for i, where in enumerate(ndimage.find_objects(rough), 1):
        inside = rough[where] == i
        if inside.sum() >= enough:  # a strong colour's blurred edge is not foreground
            mask[where] &= ~inside | (away[where] > 0.4 * np.percentile(away[where][inside], 90))
    labels, count = ndimage.label(mask)
    area = np.stack([np.bincount(frame, minlength=count + 1)[1:] for frame in rearrange(labels, "t h w -> t (h w)")])
    seen = np.sum(area >= enough, axis=0)
    order = [i for i in np.argsort(-area.sum(axis=0), kind="stable") if seen[i] > (1 - STEADY) * t]
    rank = np.zeros(count + 1, int)
    rank[[i + 1 for i in order]] = np.arange(1, len(order) + 1)
    return rank[labels]


def _track(
    frames: Float[np.ndarray, "t h w c"],
    ground: Float[np.ndarray, "t c"],
    tube: Bool[np.ndarray, "t h w"],
    occupied: Bool[np.ndarray, "t h w"],
    world: World,
) -> Track:
    there = reduce(tube, "t h w -> t", "sum") >= max(SMALLEST * tube[0].size, 3)
    frames, ground, tube, occupied = frames[there], ground[there], tube[there], occupied[there]
    offset = frames - rearrange(ground, "t c -> t 1 1 c")
    away = np.linalg.norm(offset, axis=-1)
    color = np.stack([_core(f[m], a[m]) for f, m, a in zip(frames, tube, away, strict=True)])
    contrast = color - ground
    # An edge pixel is a mixture of both colours: how much of it is the object.
    square = rearrange(np.maximum((contrast**2).sum(-1), 1), "t -> t 1 1")  # a colourful mess can be grey in the median
    alpha = einsum(offset, contrast, "t h w c, t c -> t h w") / square
    from scipy import ndimage

    near = ndimage.binary_dilation(tube, np.ones((1, 3, 3)), iterations=max(2, tube.shape[1] // 16))
    # Doubled around one half, because sharpening undoes blur and silences noise.
    alpha = np.clip(2 * alpha - 0.5, 0, 1) * (near & (tube | ~occupied))
    area, y, x = _moments(alpha)
    names = iter(zip(map(_nearest, color), _shapes(alpha, area, y, x, world.shapes), strict=True))
    colors, shapes = zip(*[next(names) if here else (None, None) for here in there], strict=True)
    time = np.linspace(0, 1, len(there))[there]
    h, w = tube.shape[1:]
    return Track(colors, shapes, _motion(time, y / h, x / w, np.sqrt(area)) if np.mean(there) >= STEADY else None)


def _core(pixels: np.ndarray, away: np.ndarray) -> np.ndarray:
    return np.median(pixels[away >= np.percentile(away, 60)], axis=0)


def _nearest(color: np.ndarray) -> str | None:
    distance = np.linalg.norm(color - np.array(list(RGB.values())), axis=1)
    return list(RGB)[np.argmin(distance)] if distance.min() <= TOLERANCE else None


def _moments(alpha: Float[np.ndarray, "t h w"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Area in pixels and centroid y, x of each frame."""
    area = reduce(alpha, "t h w -> t", "sum") + 1e-3
    y = einsum(alpha, np.arange(alpha.shape[1]) + 0.5, "t h w, h -> t") / area
    x = einsum(alpha, np.arange(alpha.shape[2]) + 0.5, "t h w, w -> t") / area
    return area, y, x


def _shapes(
    alpha: Float[np.ndarray, "t h w"], area: np.ndarray, y: np.ndarray, x: np.ndarray, known: Sequence[str]
) -> list[str | None]:
    """The shape whose render, as large and as centred, overlaps best, in each frame."""
    overlap = []
    for shape in known:
        template = coverage(shape, y, x, np.sqrt(area / _unit_area(shape)), alpha.shape[1:])
        union = reduce(np.maximum(alpha, template), "t h w -> t", "sum") + 1e-3
        overlap.append(reduce(np.minimum(alpha, template), "t h w -> t", "sum") / union)
    best = np.argmax(overlap, axis=0)
    return [known[i] if value >= OVERLAP else None for i, value in zip(best, np.max(overlap, axis=0), strict=True)]


@functools.cache
def _unit_area(shape: str) -> float:
    """Area of a shape of radius 1."""
    y, x = np.mgrid[-1.5:1.5:600j, -1.5:1.5:600j]
    return float(np.mean(OUTLINES[shape](y, x) < 0) * 9)


def _motion(time: np.ndarray, y: np.ndarray, x: np.ndarray, size: np.ndarray) -> str | None:
    """The one motion that fits: a clear straight way along one axis, or a clear change of size, or neither."""
    if len(time) < 2:
        return "stays"
    (dy, dx, growth), residual = _slopes(time, np.stack([y, x, np.log(size)], axis=1))
    if np.hypot(*residual[:2]) > JITTER:
        return None
    moved, grew = np.hypot(dy, dx) > MOVED, abs(growth) > GREW
    if moved and grew:
        return None
    if grew:
        return "grows" if growth > 0 else "shrinks"
    if not moved:
        return "stays"
    if min(abs(dy), abs(dx)) > 0.5 * max(abs(dy), abs(dx)):
        return None  # diagonal
    return ("up" if dy < 0 else "down") if abs(dy) > abs(dx) else ("left" if dx < 0 else "right")


def _slopes(time: Float[np.ndarray, " t"], values: Float[np.ndarray, "t k"]) -> tuple[np.ndarray, np.ndarray]:
    """Least-squares slope and rms residual of each column over time."""
    line = np.stack([time, np.ones_like(time)], axis=1)
    fit = np.linalg.lstsq(line, values, rcond=None)[0]
    return fit[0], np.sqrt(np.mean((values - line @ fit) ** 2, axis=0))


def _match(tracks: Sequence[Track], things: Sequence[Thing]) -> dict[str, bool]:
    """Colour, shape and motion of all things, under the assignment of tracks that makes most of them right."""
    nothing = Track((None,), (None,), None)
    candidates = [*tracks[: len(things)], *[nothing] * (len(things) - len(tracks))]

    def verdict(order: tuple[Track, ...]) -> dict[str, list[bool]]:
        pairs = list(zip(order, things, strict=True))
        return {
            "color": [_mostly(track.colors, thing.color) for track, thing in pairs],
            "shape": [_mostly(track.shapes, thing.shape) for track, thing in pairs],
            "motion": [track.motion == thing.motion for track, thing in pairs],
        }

    best = max(map(verdict, itertools.permutations(candidates)), key=lambda v: sum(map(sum, v.values())))
    return {name: all(values) for name, values in best.items()}


def _mostly(names: Sequence[str | None], asked: str) -> bool:
    return sum(name == asked for name in names) >= STEADY * len(names)
