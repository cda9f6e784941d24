"""What every video codec asks of its input."""

from vgjax.errors import UserError


def check_video(
    frames: int, height: int, width: int, time_factor: int, space_factor: int, streaming: bool = False
) -> None:
    """A `UserError`, with the nearest size that works, where a codec of these factors cannot encode such a video.

    A video has `1 + time_factor * k` frames, one that continues a stream `time_factor * k`.
    """
    for name, size in (("height", height), ("width", width)):
        if size % space_factor or not size:
            near = max(1, round(size / space_factor)) * space_factor
            raise UserError(
                f"video {name} {size} is not a multiple of {space_factor}, the VAE's down-sampling; "
                f"the nearest {name} that works is {near}"
            )
    first, least = (0, 1) if streaming else (1, 0)
    if (frames - first) % time_factor or not frames:
        near = first + max(least, round((frames - first) / time_factor)) * time_factor
        rule = f"{time_factor}k" if streaming else f"1 + {time_factor}k"
        raise UserError(f"{frames} frames are not {rule}; the nearest number of frames that works is {near}")
