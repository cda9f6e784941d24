"""Video files: what is written comes back, and every odd file is read right or refused with the true reason."""

import io
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vgjax.data import decode
from vgjax.data.decode import Timeline, TooSlow, Unreadable, read_clip, timeline
from vgjax.data.video import contact_sheet, read_image, write_mp4
from vgjax.errors import UserError

DATA = Path(__file__).parents[2] / "../shared/data"
ODD = ("corrupted.mp4", "cp1251_handler.mov")
CLIPS = [path for path in sorted(DATA.glob("*/*.m*")) if path.suffix in decode.VIDEOS and path.name not in ODD]


def cases(*names):
    return [path for path in (DATA / "cases" / name for name in names) if path.exists()]


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


def discs(t=17, h=64, w=64):
    """A coloured disc that moves over a coloured ground."""
    y, x = np.mgrid[:h, :w]
    video = np.empty((t, h, w, 3), np.uint8)
    video[:] = (30, 60, 200)
    for i in range(t):
        video[i, (y - h // 2) ** 2 + (x - 10 - 2 * i) ** 2 < 100] = (220, 40, 30)
    return video


def counting(t):
    """Frame i is grey of level 10 i: a picture tells its own number."""
    return np.full((t, 32, 32, 3), 10 * np.arange(t)[:, None, None, None], np.uint8)


def numbers(clip):
    return np.round(clip.mean((1, 2, 3)) / 10).astype(int).tolist()


def encode(path, video, pts, base=1000, format=None, codec="libx264", rotate=None, frames_b=0, **context):
    """Writes frames at any time stamps, with any codec or container: what `write_mp4` rightly can't do."""
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, base)
        stream.codec_context.max_b_frames = frames_b
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if rotate:
            stream.set_display_rotation(*rotate)
        for image, stamp in zip(video, pts, strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p",
                dst_color_range=context.get("color_range", 1),
                dst_colorspace=context.get("colorspace", 5),
            )
            frame.pts, frame.time_base, frame.pict_type = int(stamp), Fraction(1, base), PictureType.NONE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def line_of(path):
    stat = os.stat(path)
    return timeline(str(path), stat.st_mtime_ns, stat.st_size)


def test_what_is_written_comes_back_in_the_same_colours_at_the_same_rate(tmp_path):
    video = discs()
    write_mp4(tmp_path / "a.mp4", video, fps=8)
    back = read_clip(tmp_path / "a.mp4", 17, (64, 64), fps=8)
    assert back.dtype == np.uint8 and back.shape == video.shape
    assert (
        psnr(back, video) > 28
    )  # all of the loss is 4:2:0 at the rim of the disc: without the codec 30 dB, with 4:4:4 44 dB
    flat = np.abs(back[:, :8].astype(int) - video[:, :8]).mean((0, 1, 2))
    assert flat.max() < 2, f"colours of the ground shift by {flat}"
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
        assert container.streams.video[0].average_rate == 8
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_ntsc_rate_is_kept(tmp_path):
    write_mp4(tmp_path / "a.mp4", discs(3), fps=30000 / 1001)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)


def test_the_same_video_gives_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_mp4(tmp_path / name, discs(5), fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"codec": "libnope"}, "'libnope'.*it has: .*libx264"),
        ({"codec": "gif"}, "'gif'"),
        ({"video": discs(2, 31, 32)}, "must be even, got 31x32"),
        ({"fps": 0}, "fps > 0"),
        ({"video": discs(0)}, "at least one frame"),
        ({"path": "/proc/nowhere/a.mp4"}, "/proc/nowhere/a.mp4: can't be written"),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_sentence(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        write_mp4(**({"path": tmp_path / "a.mp4", "video": discs(2), "fps": 8} | change))
    assert not list(tmp_path.iterdir())


def test_odd_sizes_are_written_without_chroma_subsampling(tmp_path):
    write_mp4(tmp_path / "a.mp4", discs(2, 31, 33), fps=8, pixel_format="yuv444p")
    assert psnr(read_clip(tmp_path / "a.mp4", 2, (31, 33)), discs(2, 31, 33)) > 34


def test_contact_sheet_has_a_row_for_each_video_and_grows_small_frames_without_blur(tmp_path):
    colours = np.array([(255, 0, 0), (0, 0, 255)], np.uint8)
    videos = [np.broadcast_to(colour, (9, 32, 32, 3)).copy() for colour in colours]
    sheet = contact_sheet(videos, ["red", "blue " * 40], frames=3, path=tmp_path / "s.png")
    pixels = np.asarray(sheet)
    for colour in colours:
        assert (pixels == colour).all(-1).sum() == 3 * 128 * 128
    assert np.array_equal(np.asarray(Image.open(tmp_path / "s.png")), pixels)
    assert (pixels < 60).all(-1).any(), "the captions are not there"
    contact_sheet([discs(1, 200, 300)], ["an image"])
    with pytest.raises(UserError, match="one caption per video"):
        contact_sheet(videos, ["only one"])


@pytest.mark.parametrize("path", CLIPS, ids=lambda path: path.name)
def test_real_files_give_the_frames_that_decoding_everything_in_order_gives(path):
    with av.open(str(path)) as container:
        ratio = float(container.streams.video[0].sample_aspect_ratio or 1)
        every = [(frame.time, frame) for frame in container.decode(video=0)]
    assert [time for time, _ in every] == sorted(time for time, _ in every)
    line = line_of(path)
    assert len(line.times) == len(every)
    assert np.allclose(line.times, np.array([time for time, _ in every]) - every[0][0])
    for seed, fps in ((0, None), (1, 8.0), (2, 24.0)):
        frames = min(5, line.available(fps))
        picks = line.window(frames, fps, np.random.default_rng(seed))
        clip = read_clip(path, frames, (48, 64), fps, np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        line.window(frames, fps, rng)
        fit = decode._Fit((48, 64), rng)
        assert clip.shape == (frames, 48, 64, 3)
        assert all(np.array_equal(image, fit(every[i][1], ratio)) for image, i in zip(clip, picks, strict=True))


@pytest.mark.parametrize("path", cases("latin1_title.avi", "cp1251_handler.mov"), ids=lambda path: path.name)
def test_a_file_whose_tags_are_not_utf8_is_read(path):
    assert read_clip(path, 60, (32, 32)).std() > 0


def test_tags_in_any_encoding_do_not_keep_a_file_from_being_read(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("mpeg4", rate=25)
        stream.height = stream.width = 32
        for image in counting(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"TITLE", b"caf\xe9 "))
    assert numbers(read_clip(path, 3, (32, 32))) == [0, 1, 2]


@pytest.mark.parametrize(
    "error", [RuntimeError("odd"), UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "bad"), MemoryError()]
)
def test_whatever_a_decoder_raises_makes_the_file_unreadable(tmp_path, monkeypatch, error):
    path = encode(tmp_path / "a.mp4", counting(3), [0, 40, 80])

    def broken(*args):
        raise error

    monkeypatch.setattr(decode, "_decode", broken)
    with pytest.raises(Unreadable, match="can't be read: ."):
        read_clip(path, 2, (32, 32))


def test_an_endless_file_is_given_up_between_its_packets(tmp_path):
    for name, of in {"a.avi": {"codec": "mpeg4"}, "a.mp4": {}}.items():
        path = encode(tmp_path / name, counting(9), 40 * np.arange(9), **of)
        with pytest.raises(TooSlow):
            read_clip(path, 2, (32, 32), seconds=0)
        assert len(read_clip(path, 2, (32, 32), seconds=60)) == 2


@pytest.mark.parametrize("path", cases("editlist_a.mp4", "editlist_b.mp4"), ids=lambda path: path.name)
def test_a_clip_cut_without_encoding_is_read_from_the_first_frame_that_is_shown(path):
    with av.open(str(path)) as container:
        shown = [frame.pts for frame in container.decode(video=0)]
    assert line_of(path).pts.tolist() == shown
    count, luma = {"editlist_a.mp4": (92, 109), "editlist_b.mp4": (122, 25)}[path.name]
    clip = read_clip(path, count, (32, 32))
    assert len(shown) == count and abs(clip[0].mean() - luma) < 25 and clip[-1].mean() > clip[0].mean()


@pytest.mark.parametrize("path", list(DATA.glob("odd/corrupted.mp4")), ids=lambda path: path.name)
def test_a_damaged_file_gives_the_windows_that_decode_and_says_where_the_others_fail(path):
    assert read_clip(path, 20, (32, 32)).shape == (20, 32, 32, 3)
    with pytest.raises(Unreadable, match=r"decoding fails after 28 of 50 frames \(Invalid data"):
        read_clip(path, 40, (32, 32))


@pytest.mark.parametrize("path", list(DATA.glob("odd/rotation_90.mov")), ids=lambda path: path.name)
def test_real_rotation_metadata_is_applied(path):
    with av.open(str(path)) as container:
        stored = next(container.decode(video=0))
    assert stored.rotation == -90  # counter-clockwise degrees
    shown = np.rot90(stored.to_ndarray(format="rgb24"), k=-1)
    assert psnr(read_clip(path, 1, shown.shape[:2])[0], shown) > 35


@pytest.mark.parametrize(
    ("rotate", "show"),
    [  # degrees counter-clockwise, then the flip of the shown picture
        ((90,), lambda image: np.rot90(image, 1)),
        ((180,), lambda image: np.rot90(image, 2)),
        ((270,), lambda image: np.rot90(image, 3)),
        ((0, True, False), lambda image: image[:, ::-1]),
        ((0, False, True), lambda image: image[::-1]),
        ((90, True, False), lambda image: np.rot90(image, 1)[:, ::-1]),
    ],
)
def test_rotated_and_mirrored_files_are_shown_upright(tmp_path, rotate, show):
    image = np.zeros((1, 32, 64, 3), np.uint8)
    image[:, :16, :32], image[:, 16:, :32], image[:, :16, 32:] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    shown = show(read_clip(encode(tmp_path / "a.mp4", image, [0]), 1, (32, 64))[0])
    assert np.array_equal(
        read_clip(encode(tmp_path / "b.mp4", image, [0], rotate=rotate), 1, shown.shape[:2])[0], shown
    )


def test_ten_bit_and_full_range_and_other_matrices_keep_their_colours(tmp_path):
    video = discs(3)
    for name, tags in {"full": {"color_range": 2}, "bt709": {"colorspace": 1}, "bt601": {"colorspace": 5}}.items():
        back = read_clip(encode(tmp_path / f"{name}.mp4", video, [0, 40, 80], **tags), 3, (64, 64))
        assert np.abs(back[:, :8].astype(int) - video[:, :8]).mean() < 3, name
    write_mp4(tmp_path / "deep.mp4", video, 8, pixel_format="yuv444p10le")
    assert psnr(read_clip(tmp_path / "deep.mp4", 3, (64, 64)), video) > 40


def test_frames_of_variable_rate_are_picked_by_the_time_they_are_shown(tmp_path):
    stamps = [0, 40, 80, 500, 540, 1000, 1500, 1900]
    path = encode(tmp_path / "a.mp4", counting(8), stamps, frames_b=2)
    assert numbers(read_clip(path, 8, (32, 32))) == list(range(8))
    assert numbers(read_clip(path, 4, (32, 32), fps=2)) == [0, 3, 5, 6]
    assert numbers(read_clip(path, 8, (32, 32), fps=4)) == [0, 2, 3, 4, 5, 5, 6, 6]


def test_the_first_frame_is_time_zero_whatever_its_stamp(tmp_path):
    path = encode(tmp_path / "a.mkv", counting(6), 5000 + 40 * np.arange(6))
    assert numbers(read_clip(path, 3, (32, 32), fps=12.5)) == [0, 2, 4]


def test_a_container_without_time_stamps_is_read_in_order(tmp_path):
    path = encode(tmp_path / "a.avi", counting(10), 40 * np.arange(10), codec="mpeg4", frames_b=2)
    assert numbers(read_clip(path, 5, (32, 32), fps=12.5)) == [0, 2, 4, 6, 8]
    assert not line_of(encode(tmp_path / "b.h264", counting(10), 40 * np.arange(10), format="h264")).stamped
    assert numbers(read_clip(tmp_path / "b.h264", 10, (32, 32))) == list(range(10))


def test_seeking_changes_nothing(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mp4", counting(25), 40 * np.arange(25), gop_size=5, frames_b=2)
    assert len(line_of(path).keys) >= 5
    seeks, collect = [], decode._collect
    monkeypatch.setattr(decode, "_collect", lambda *args: (seeks.append(args[4]), collect(*args))[1])
    for seed in range(8):
        picks = line_of(path).window(4, 25.0, np.random.default_rng(seed))
        assert numbers(read_clip(path, 4, (32, 32), 25.0, np.random.default_rng(seed))) == picks.tolist()
    assert any(seek is not None for seek in seeks), "not one window was far enough to seek"
    assert len(seeks) == 8, "a seek did not find its frames"


@settings(max_examples=200, deadline=None)
@given(
    gaps=st.lists(st.floats(0.005, 0.5), min_size=1, max_size=40),
    frames=st.integers(1, 12),
    fps=st.sampled_from([None, 1.0, 7.5, 8.0, 24.0, 30000 / 1001]),
    seed=st.one_of(st.none(), st.integers(0, 9)),
)
def test_every_window_lies_in_the_video_and_shows_the_frame_of_the_moment(gaps, frames, fps, seed):
    ends = np.cumsum(gaps)
    times = ends - gaps
    line = Timeline(times, np.arange(len(gaps)), np.zeros(1, np.int64), float(ends[-1]), True)
    if line.available(fps) < frames:
        with pytest.raises(Unreadable, match=f"too short: {frames} frames.* needed, {line.available(fps)} available"):
            line.window(frames, fps, None)
        return
    picks = line.window(frames, fps, None if seed is None else np.random.default_rng(seed))
    assert len(picks) == frames and 0 <= picks[0] and picks[-1] < len(gaps)
    assert seed is not None or picks[0] == 0
    if fps is None:
        assert (np.diff(picks) == 1).all()
        return
    for k, pick in enumerate(picks):
        moment = times[picks[0]] + k / fps
        assert times[pick] <= moment + 2e-3 and moment < ends[pick] + 1e-6


@pytest.mark.parametrize("fps", [24.0, 25.0, 30.0, 30000 / 1001, 60.0])
def test_millisecond_stamps_give_each_frame_once(fps):
    times = np.round(np.arange(90) / fps, 3)
    line = Timeline(times, np.arange(90), np.zeros(1, np.int64), times[-1] + 1 / fps, True)
    assert line.window(90, fps, None).tolist() == list(range(90))


@pytest.mark.parametrize(("height", "width"), [(40, 96), (96, 40), (33, 35)])
def test_resizing_keeps_the_aspect_and_crops_the_centre(tmp_path, height, width):
    """A square in the middle stays a square in the middle."""
    image = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2 - 8, width // 2 - 8
    image[top : top + 16, left : left + 16] = 255
    Image.fromarray(image).save(tmp_path / "a.png")
    out = read_clip(tmp_path / "a.png", 1, (24, 24))[0, :, :, 0] > 127
    side = 16 * 24 / min(height, width)
    assert abs(out.any(0).sum() - side) <= 1 and abs(out.any(1).sum() - side) <= 1
    assert abs(np.argwhere(out).mean(0) - 11.5).max() <= 1


def test_pixels_that_are_not_square_are_shown_in_their_true_shape(tmp_path):
    video = np.zeros((1, 32, 32, 3), np.uint8)
    video[:, 12:20, 12:20] = 255
    path = encode(tmp_path / "a.mp4", video, [0], sample_aspect_ratio=Fraction(2, 1))
    shown = read_clip(path, 1, (32, 32))[0, :, :, 0] > 127
    assert abs(shown.any(0).sum() - 16) <= 1 and abs(shown.any(1).sum() - 8) <= 1


def test_shrinking_is_antialiased(tmp_path):
    board = (np.indices((128, 128)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    assert np.abs(read_clip(tmp_path / "a.png", 1, (32, 32)).astype(int) - 127).max() < 12


def test_random_crops_reach_both_sides_and_are_the_same_for_all_frames(tmp_path):
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[:, None] * 2, (4, 32, 96, 3)).copy()
    write_mp4(tmp_path / "a.mp4", ramp, 8, crf=1)
    clips = [read_clip(tmp_path / "a.mp4", 4, (32, 32), 8, np.random.default_rng(seed)) for seed in range(30)]
    lefts = {int(clip[0, :, 0].mean().round()) // 2 for clip in clips}
    assert min(lefts) < 8 and max(lefts) > 56
    assert all(np.abs(clip.astype(int) - clip[:1]).mean() < 2 for clip in clips)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_image_is_a_video_of_one_frame(tmp_path, suffix):
    image = Image.fromarray(discs(1)[0])
    image.save(tmp_path / f"a.{suffix}", quality=95)
    assert psnr(read_clip(tmp_path / f"a.{suffix}", 1, (64, 64), fps=8), discs(1)) > 25
    with pytest.raises(Unreadable, match="an image has 1"):
        read_clip(tmp_path / f"a.{suffix}", 5, (64, 64), fps=8)


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(discs(1, 32, 64)[0]).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert psnr(read_clip(tmp_path / "a.jpg", 1, (64, 32))[0], np.rot90(discs(1, 32, 64)[0], -1)) > 25
    assert np.array_equal(read_image(tmp_path / "a.jpg"), read_clip(tmp_path / "a.jpg", 1, (64, 32))[0])


@pytest.mark.parametrize(
    "name",
    ["empty.mp4", "noise.mp4", "noise.png", "sound.mp4", "missing.mp4", "headless.mp4", "cut_index.mp4", "cut.png"],
)
def test_what_is_no_video_is_refused_with_the_reason(tmp_path, name):
    path = tmp_path / name
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(png, "PNG")
    encode(tmp_path / "whole.mov", counting(9), 40 * np.arange(9))  # its index lies at the end
    content = {
        "empty.mp4": b"",
        "noise.mp4": np.random.default_rng(1).bytes(5000),
        "noise.png": np.random.default_rng(2).bytes(5000),
        "headless.mp4": (tmp_path / "whole.mov").read_bytes()[:-1200],
        "cut_index.mp4": (tmp_path / "whole.mov").read_bytes()[:-400],
        "cut.png": png.getvalue()[:6000],
    }
    if name in content:
        path.write_bytes(content[name])
    if name == "sound.mp4":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    reasons = {
        "empty.mp4": "Invalid data",
        "noise.mp4": "Invalid data",
        "noise.png": "cannot identify image",
        "sound.mp4": "has no video stream",
        "missing.mp4": "No such file",
        "headless.mp4": "Invalid data",
        "cut_index.mp4": "its index is damaged",
        "cut.png": "truncated",
    }
    with pytest.raises(Unreadable, match=reasons[name]):
        read_clip(path, 1, (32, 32))


def test_a_cut_off_download_gives_only_frames_that_are_whole(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (25, 64, 64, 3), np.uint8)
    write_mp4(tmp_path / "whole.mp4", noise, 25)
    data = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    whole = read_clip(tmp_path / "whole.mp4", 10, (64, 64))
    assert np.array_equal(read_clip(tmp_path / "cut.mp4", 10, (64, 64)), whole)
    with pytest.raises(Unreadable, match="decoding fails after|too short"):
        read_clip(tmp_path / "cut.mp4", len(line_of(tmp_path / "cut.mp4").times), (64, 64))


def test_flipped_bits_are_noticed_and_never_crash(tmp_path):
    write_mp4(tmp_path / "a.mp4", np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8), 8)
    data, rng = bytearray((tmp_path / "a.mp4").read_bytes()), np.random.default_rng(3)
    start, refused = data.index(b"mdat"), 0
    for i in range(30):
        broken = bytearray(data)
        broken[rng.integers(start + 800, len(data))] ^= 1 << int(rng.integers(8))
        (tmp_path / f"{i}.mp4").write_bytes(broken)
        try:
            read_clip(tmp_path / f"{i}.mp4", 8, (64, 64))
        except Unreadable:
            refused += 1
    assert refused >= 20, f"only {refused} of 30 damaged files were refused"
