"""Video files out: H.264 mp4 and contact sheets. Files in: `vgjax.data.decode`.

Videos are uint8 `t h w 3` in RGB. Files are written beside their final name and renamed when complete, so a killed
process leaves no half video under a name that somebody reads.
"""

import errno
import os
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vgjax.errors import UserError

# swscale widens the kernel when it shrinks (antialiased); full chroma gives 37.1 dB instead of 34.9 on coloured shapes;
# bit-exact arithmetic gives the same pixels on every CPU.
SCALING = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
BT709 = 1  # H.273 code of the colour matrix, primaries and transfer
LIMITED = 1  # H.273 code of the 16-235 range


def write_mp4(
    path: str | Path,
    video: UInt8[np.ndarray, "t h w 3"],
    fps: float | int,
    crf: int = 18,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
) -> None:
    """Writes an mp4, tagged BT.709 so that every player (and our reader) gets the same colours back.

    `fps` in frames per second, `crf` the constant quality of x264 (lower is better, 18 is visually lossless).
    4:2:0 blurs the rims of small saturated shapes (29 dB on 64x64 discs, 44 dB with pixel_format="yuv444p"). Raises
    UserError for a codec that FFmpeg lacks here, an odd size with 4:2:0 chroma, or a place that can't be written.
    """
    t, h, w, _ = video.shape
    if t == 0 or not 0 < fps < float("inf"):
        raise UserError(f"{path}: a video needs at least one frame and fps > 0, got {t} frames at {fps} fps")
    if "420" in pixel_format and (h % 2 or w % 2):
        raise UserError(
            f"{path}: {pixel_format} halves the chroma, so height and width must be even, got {h}x{w}; "
            f"use an even size or pixel_format='yuv444p'"
        )
    with (
        _whole_file(path) as temporary,
        _encoding(codec, path),
        av.open(temporary, "w", format="mp4", options=_FASTSTART) as container,
    ):
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = h, w, pixel_format
        context = stream.codec_context
        context.options = {"crf": str(crf)}
        context.thread_count = 1  # x264's output depends on the number of threads
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED
        for i, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
                format=pixel_format, dst_colorspace=BT709, dst_color_range=LIMITED, interpolation=SCALING
            )
            frame.pts, frame.time_base = i, 1 / context.framerate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


_FASTSTART = {"movflags": "+faststart"}  # the index first: the file streams, and a cut-off copy still opens


# What is wrong with the place of a file; any other error of FFmpeg is the encoder's.
PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO, errno.ENOENT, errno.EFBIG, errno.ENOTDIR}


@contextmanager
def _encoding(codec: str, path: str | Path) -> Iterator[None]:
    """Tells an encoder that can't be used from a place that can't be written."""
    try:
        yield
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, UserError) or getattr(error, "errno", None) in PLACE and _has(codec):
            raise
        raise _missing(codec, f"{path}: ", str(error)) from error


def check_codec(codec: str, folder: Path, size: tuple[int, int], fps: float | int) -> None:
    """UserError for an encoder that can't be used, before there is anything to lose: it encodes one frame in `folder`.

    An encoder may be built in and yet lack its hardware, or the mp4 a place for its streams.
    """
    with tempfile.TemporaryDirectory(prefix=".codec-", dir=folder) as trial:
        write_mp4(Path(trial) / "frame.mp4", np.zeros((1, *size, 3), np.uint8), fps, codec=codec)


def keep_frames(name: str, folders: Sequence[Path], videos: UInt8[np.ndarray, "n t h w 3"], prompts: list[str]) -> Path:
    """Videos that could not be encoded, as an .npz of `videos` and `prompts` in the first folder that takes it."""
    for folder in folders:
        try:
            np.savez_compressed(folder / name, videos=videos, prompts=np.array(prompts))
            return folder / name
        except OSError:
            (folder / name).unlink(missing_ok=True)  # half of it
    raise UserError(f"no room for the frames in {' or '.join(map(str, folders))}")


def _missing(codec: str, where: str, why: str) -> UserError:
    known = [name for name in ("libx264", "libopenh264", "libx265", "libvpx-vp9", "libsvtav1", "mpeg4") if _has(name)]
    return UserError(
        f"{where}this build of FFmpeg can't write the codec {codec!r} to mp4 ({why}); it has: {', '.join(known)}"
    )


def _has(codec: str) -> bool:
    try:
        return bool(av.codec.Codec(codec, "w").name)
    except (av.error.FFmpegError, ValueError):
        return False


@contextmanager
def _whole_file(path: str | Path) -> Iterator[str]:
    """Gives a temporary name beside `path`, renamed to it on success and removed on failure."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield str(temporary)
        os.replace(temporary, path)
    except (OSError, av.error.FFmpegError) as error:
        why = error.strerror or error
        raise UserError(f"{path}: can't be written ({why}); check the folder, its rights and the disk") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_image(path: str | Path) -> UInt8[np.ndarray, "h w 3"]:
    """A picture in any format that Pillow reads, upright as its EXIF says, or a `UserError`."""
    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except Exception as error:  # Pillow's readers raise what they like on broken files, SyntaxError included
        raise UserError(f"{path} cannot be read as a picture ({error}): give a PNG or JPEG") from error


def contact_sheet(
    videos: Sequence[UInt8[np.ndarray, "_t _h _w 3"]],
    captions: Sequence[str],
    frames: int = 6,
    path: str | Path | None = None,
    cell: int = 128,
    text: int = 15,
) -> Image.Image:
    """A picture with one row per video: `frames` moments spread over time, the caption under them.

    Frames are shown at about `cell` pixels of height: small ones grow by a whole factor without blur, large ones
    shrink. `text` is the font size in pixels. Saved as PNG where `path` is given.
    """
    if len(videos) != len(captions) or not videos:
        raise UserError(f"a contact sheet needs one caption per video, got {len(captions)} for {len(videos)} videos")
    font = ImageFont.load_default(size=text)
    rows = [_moments(video, frames, cell) for video in videos]
    gap, line = 4, round(text * 1.35)
    width = max(2 * gap + sum(image.width + gap for image in row) for row in rows)
    letters = max(10, int((width - 2 * gap) / (0.55 * text)))
    wrapped = [textwrap.wrap(caption, letters) or [""] for caption in captions]
    heights = [row[0].height + line * len(lines) + 3 * gap for row, lines in zip(rows, wrapped, strict=True)]
    sheet = Image.new("RGB", (width, sum(heights) + gap), (226, 226, 226))
    draw, top = ImageDraw.Draw(sheet), gap
    for row, lines, height in zip(rows, wrapped, heights, strict=True):
        left = gap
        for image in row:
            sheet.paste(image, (left, top))
            left += image.width + gap
        draw.multiline_text((gap, top + row[0].height + gap // 2), "\n".join(lines), "black", font, spacing=line - text)
        top += height
    if path is not None:
        with _whole_file(path) as temporary:
            sheet.save(temporary, format="PNG")
    return sheet


def _moments(video: np.ndarray, frames: int, cell: int) -> list[Image.Image]:
    t, h, w, _ = video.shape
    times = np.unique(np.linspace(0, t - 1, frames).round().astype(int))
    images = [Image.fromarray(np.ascontiguousarray(video[i])) for i in times]
    if h >= cell:
        return [image.resize((max(1, round(w * cell / h)), cell), Image.Resampling.LANCZOS) for image in images]
    factor = max(1, round(cell / h))
    return [image.resize((w * factor, h * factor), Image.Resampling.NEAREST) for image in images]
