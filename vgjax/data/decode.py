"""Video and image files in: the frames shown at given moments, upright, resized and cropped, as uint8 `t h w 3` RGB.

A file is demuxed once for its `Timeline` (when each frame is shown; no decoding), then only the stretch from the last
keyframe before the window is decoded. Frames are found by presentation time stamp, never by counting, so variable frame
rates, B-frames and headers without a frame count need no special care. Frames that the decoder had to mend are refused:
that notices 52 of 60 single-bit flips in an H.264 file and half of them in MPEG-4, but next to none in HEVC and VP9, so
sources that matter deserve a checksum.
"""

import functools
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from einops import rearrange
from jaxtyping import Float64, Int64, UInt8

from vgjax.data.storage import reason
from vgjax.data.video import BT709, SCALING, read_image
from vgjax.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (
    ".mp4",
    ".mov",
    ".m4v",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".m2ts",
    ".flv",
    ".wmv",
    ".ogv",
    ".3gp",
)

UNSPECIFIED = 2  # H.273 code of an untagged colour matrix
SLACK = 1e-3  # seconds; Matroska rounds time stamps to milliseconds
# Until when (time.monotonic) this thread may read; no argument, because a cached Timeline does not depend on it.
DEADLINE: ContextVar[float] = ContextVar("deadline", default=math.inf)


class Unreadable(UserError):
    """A file that gives no clip, with the true reason."""


class TooSlow(Unreadable):
    """A file that takes longer to read than it may."""


@dataclass(frozen=True)
class Timeline:
    """When the frames of a file are shown: `times` in seconds from the first frame to `end`, in order of presentation.

    `pts` are the stamps the decoder will give, or positions 0, 1, 2... where the container has none (`stamped` False).
    `keys` are the stamps of keyframes.
    """

    times: Float64[np.ndarray, " n"]
    pts: Int64[np.ndarray, " n"]
    keys: Int64[np.ndarray, " k"]
    end: float
    stamped: bool

    def available(self, fps: float | int | None) -> int:
        """Frames that a window from the first frame to the end holds at `fps`."""
        return len(self.times) if fps is None else int(np.ceil((self.end - SLACK) * fps))

    def window(
        self, frames: int, fps: float | int | None, rng: np.random.Generator | None
    ) -> Int64[np.ndarray, " frames"]:
        """Positions of the frames on screen at `start + k / fps`.

        `start` is a random frame, or the first one without `rng`; `fps=None` takes consecutive frames.
        """
        if self.available(fps) < frames:
            pace = "" if fps is None else f" at {fps:g} fps"
            raise Unreadable(f"too short: {frames} frames{pace} needed, {self.available(fps)} available")
        if fps is None:
            starts = np.arange(len(self.times) - frames + 1)
        else:
            starts = np.flatnonzero(self.times + (frames - 1) / fps < self.end - SLACK)
        start = int(starts[0] if rng is None else rng.choice(starts))
        if fps is None:
            return np.arange(start, start + frames)
        moments = self.times[start] + np.arange(frames) / fps
        return np.searchsorted(self.times, moments + SLACK, side="right") - 1


def read_clip(
    path: str | Path,
    frames: int,
    size: tuple[int, int],
    fps: float | int | None = None,
    rng: np.random.Generator | None = None,
    seconds: float | int | None = None,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Reads `frames` frames at `fps`, the shorter side resized to fit `size` (height, width) and the rest cropped.

    With `rng` the window and the crop are random, without it the window is the first and the crop central. An image is
    a video of one frame. Raises Unreadable with the reason, whatever the decoder raised, and TooSlow after `seconds`,
    looked at between packets; a file damaged in one place still gives the windows that decode.
    """
    path = Path(path)
    before = DEADLINE.set(math.inf if seconds is None else time.monotonic() + seconds)
    try:
        if path.suffix.lower() in IMAGES:
            if frames != 1:
                raise Unreadable(f"too short: {frames} frames needed, an image has 1")
            fit = _Fit(size, rng)
            image = av.VideoFrame.from_ndarray(read_image(path), format="rgb24")
            return rearrange(fit(image), "h w c -> 1 h w c")
        stat = os.stat(path)
        line = timeline(str(path), stat.st_mtime_ns, stat.st_size)
        wanted = line.pts[line.window(frames, fps, rng)].tolist()
        return _decode(path, line, wanted, _Fit(size, rng))
    except Unreadable:
        raise
    except Exception as error:  # broken files find many ways to fail, and each is that file's fault alone
        _in_time()
        raise Unreadable(f"can't be read: {reason(error)}") from error
    finally:
        DEADLINE.reset(before)


def _in_time() -> None:
    if time.monotonic() > DEADLINE.get():
        raise TooSlow("takes too long to read")


@functools.lru_cache(maxsize=4096)
def timeline(path: str, modified_ns: int, size: int) -> Timeline:
    """The Timeline of a file; kept in memory for as long as its time of modification and size stay what they are."""
    with _open(path) as (container, stream):
        packets = [(p.pts, p.is_keyframe, p.duration, p.is_discard) for p in _packets(container, stream) if p.size]
        base, rate = stream.time_base, float(stream.average_rate or stream.guessed_rate or 25)
    if packets and all(pts is not None for pts, *_ in packets):
        # Nothing decodes before a keyframe, which an edit list may hide: it is decoded and not shown.
        first = next((pts for pts, key, *_ in packets if key), packets[0][0])
        durations = {pts: duration for pts, _, duration, hidden in packets if pts >= first and not hidden}
        if not durations:
            raise Unreadable("has no frames that are shown")
        pts = np.array(sorted(durations), np.int64)
        keys = np.array(sorted(pts for pts, key, *_ in packets if key), np.int64)
        times = (pts - pts[0]) * float(base)
        last = float((durations[pts[-1]] or 0) * base) or (np.median(np.diff(times)) if len(times) > 1 else 1 / rate)
        return Timeline(times, pts, keys, float(times[-1] + last), True)
    # AVI and raw streams carry no presentation times: only decoding tells how many frames there are.
    with _open(path) as (container, stream):
        count = sum(len(packet.decode()) for packet in _packets(container, stream))
    if count == 0:
        raise Unreadable("has no frames")
    return Timeline(np.arange(count) / rate, np.arange(count), np.zeros(0, np.int64), count / rate, False)


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a video for decoding in one thread: the loader's workers are the parallelism."""
    left = DEADLINE.get() - time.monotonic()
    # "file:" because a colon in a name is not a protocol; tags are of any encoding, and nobody reads them.
    with av.open(
        f"file:{path}", metadata_errors="replace", timeout=None if left == math.inf else max(left, 1e-3)
    ) as container:
        if not container.streams.video:
            raise Unreadable("has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise Unreadable("its index is damaged, or this build of FFmpeg lacks its codec")
        stream.thread_type, stream.thread_count = "NONE", 1
        yield container, stream


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The packets of a stream, while there is time."""
    for packet in container.demux(stream):
        _in_time()
        yield packet


def _decode(path: Path, line: Timeline, wanted: list[int], fit: "_Fit") -> UInt8[np.ndarray, "t h w 3"]:
    """The frames with these stamps, found after a seek, or from the start where seeking does not give all of them."""
    keys = line.keys[line.keys <= wanted[0]]
    found: dict[int, np.ndarray] = {}
    if len(keys) and keys[-1] > line.pts[0]:
        found, _, _ = _collect(path, line, set(wanted), fit, int(keys[-1]))
    if len(found) < len(set(wanted)):
        found, last, why = _collect(path, line, set(wanted), fit, None)
        if len(found) < len(set(wanted)):
            good = np.searchsorted(line.pts, last, side="right")
            raise Unreadable(f"decoding fails after {good} of {len(line.pts)} frames ({why})")
    return np.stack([found[stamp] for stamp in wanted])


def _collect(
    path: Path, line: Timeline, wanted: set[int], fit: "_Fit", seek: int | None
) -> tuple[dict[int, np.ndarray], int, str]:
    """Decodes until all wanted frames are found: the frames, the stamp of the last good frame and why it ended."""
    found: dict[int, np.ndarray] = {}
    last = int(line.pts[0]) - 1
    try:
        with _open(path) as (container, stream):
            ratio = float(stream.sample_aspect_ratio or 1)
            if seek is not None:
                container.seek(seek, stream=stream, backward=True, any_frame=False)
            frames = (frame for packet in _packets(container, stream) for frame in packet.decode())
            for position, frame in enumerate(frames):
                stamp = frame.pts if line.stamped else position
                if frame.is_corrupt:
                    return found, last, "the next frame is corrupt"
                if stamp in wanted:
                    found[stamp] = fit(frame, ratio)
                    if len(found) == len(wanted):
                        break
                last = stamp
    except av.error.FFmpegError as error:
        _in_time()
        return found, last, reason(error)
    return found, last, "the stream ends there"


class _Fit:
    """Turns decoded frames of one clip upright, resizes them to cover `size` and cuts the same part out of each."""

    def __init__(self, size: tuple[int, int], rng: np.random.Generator | None):
        self.size = size
        self.place = (0.5, 0.5) if rng is None else rng.random(2)

    def __call__(self, frame: av.VideoFrame, pixel_ratio: float = 1.0) -> UInt8[np.ndarray, "h w 3"]:
        height, width = self.size
        turned, flip_h, flip_w = _orientation(frame)
        h, w = frame.height, frame.width * pixel_ratio
        if turned:
            h, w = w, h
        scale = max(height / h, width / w)
        h, w = max(height, round(h * scale)), max(width, round(w * scale))
        hd = frame.colorspace == UNSPECIFIED and frame.height >= 720  # untagged: what players assume; BT.601 below
        image = frame.reformat(
            *((h, w) if turned else (w, h)),
            format="rgb24",
            src_colorspace=BT709 if hd else None,
            interpolation=SCALING,
            threads=1,
        ).to_ndarray()
        image = rearrange(image, "w h c -> h w c") if turned else image
        image = image[:: -1 if flip_h else 1, :: -1 if flip_w else 1]
        top, left = (int(u * (have - want + 1)) for u, have, want in zip(self.place, (h, w), self.size, strict=True))
        return image[top : top + height, left : left + width]


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, then flip the height, flip the width) that show a frame as its display matrix asks.

    The matrix maps stored to shown coordinates: x' = a x + c y, y' = b x + d y (ISO 14496-12, 8.5.2), fixed point.
    """
    for data in frame.side_data:
        if data.type == av.sidedata.sidedata.Type.DISPLAYMATRIX:
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            turned = abs(b) > abs(a)
            return (True, b < 0, c < 0) if turned else (False, d < 0, a < 0)
    return False, False, False
