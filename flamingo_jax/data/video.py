"""Clips from video files: frames at a steady rate, decoded by FFmpeg's libraries (PyAV, the extra `video`).

A file is untrusted: it is read through a Python file, by a list of container formats none of which names other files
or addresses, and no more of it is decoded than a clip needs.
"""

import io
import math
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clip_jax.data import transforms
from clip_jax.errors import ConfigError, RecordError

VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".ogv", ".flv"}
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,ogg,flv"
MAX_DECODED = 10_000  # frames, of one clip: 40 s at 240 a second


def read_clip(
    video: str | Path | bytes, frames: int = 8, fps: float = 1.0, size: int = 320, start: float = 0.0, key: str = ""
) -> np.ndarray:
    """`read_frames`, each resized and cropped as an image is for evaluation. uint8 [frames, size, size, 3].

    The paper trains on 8 frames at 1 a second and evaluates on 30 at 3 a second (arXiv 2204.14198, §3.1).
    """
    key = key or _name(video)
    found = read_frames(video, frames, fps, start, key)
    return np.stack([transforms.evaluation_image(frame, size, key=key) for frame in found])


def read_frames(
    video: str | Path | bytes, frames: int = 8, fps: float = 1.0, start: float = 0.0, key: str = ""
) -> list[Image.Image]:
    """What a video's first picture stream shows at start, start + 1/fps, … seconds, as RGB, turned upright.

    Args:
      video: a file, or its bytes.
      key: the record, for errors; by default the file's name.

    Raises:
      RecordError, naming the record: it can't be read or decoded, is of another format, has no pictures or too large
        ones, or ends before the last of these times.
      ConfigError: fewer than 1 frame, no rate above 0 or no start from 0 on, or PyAV is not installed.
    """
    if frames < 1 or not 0 < fps < math.inf or not 0 <= start < math.inf:
        raise ConfigError(f"frames {frames}, fps {fps}, start {start}: expected at least 1, above 0, and from 0 on")
    try:
        import av
    except ImportError:
        raise ConfigError("video files need PyAV: install the extra `video` (pip install av)") from None
    key = key or _name(video)
    wanted = [start + i / fps for i in range(frames)]
    try:
        with (
            io.BytesIO(video) if isinstance(video, bytes) else Path(video).open("rb") as file,
            av.open(file, options={"format_whitelist": FORMATS}) as container,
        ):
            found, end = _shown(container, wanted, key)
    except RecordError:
        raise
    # FFmpeg's own want of memory, too: it is a damaged file's, which states more than there is.
    except (av.FFmpegError, OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RecordError(f"{key}: the video does not decode ({reason})", reason="does_not_decode") from None
    if len(found) < frames:
        raise RecordError(
            f"{key}: a video of {end:.2f} s; {frames} frames, the last at {wanted[-1]:.2f} s, expected",
            reason="video_too_short",
        )
    return found


def _shown(container: Any, wanted: list[float], key: str) -> tuple[list[Image.Image], float]:
    """(the pictures at those of the times that are before the end, the end in seconds)."""
    if not container.streams.video:
        raise RecordError(f"{key}: no pictures in it", reason="no_pictures")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise RecordError(f"{key}: its pictures are of an unknown codec", reason="unknown_codec")
    _check_size(stream.width, stream.height, key)
    stream.codec_context.options = {"max_pixels": str(transforms.MAX_PIXELS)}
    first = float((stream.start_time or 0) * stream.time_base)
    if wanted[0] > 0:
        container.seek(int((wanted[0] + first) / stream.time_base), stream=stream)  # to the key frame before it
    found: list[Image.Image] = []
    last: Any = None
    end = 0.0
    with closing(_decoded(container, stream, key)) as decoded:
        for frame in decoded:
            time = frame.time - first
            while last is not None and len(found) < len(wanted) and wanted[len(found)] < time - 1e-6:
                found.append(_upright(last, key))
            last, end = frame, time + float((frame.duration or 0) * frame.time_base or _interval(stream))
            if len(found) == len(wanted):
                return found, end
    while last is not None and len(found) < len(wanted) and wanted[len(found)] < end - 1e-6:
        found.append(_upright(last, key))
    return found, end


def _decoded(container: Any, stream: Any, key: str) -> Generator[Any, None, None]:
    """At most MAX_DECODED frames, in the order in which they are shown."""
    for number, frame in enumerate(container.decode(stream)):
        if number == MAX_DECODED:
            raise RecordError(
                f"{key}: {MAX_DECODED:,} frames decoded without an end; a lower rate of frames expected",
                reason="too_many_frames",
            )
        if frame.pts is not None:
            yield frame


def _interval(stream: Any) -> float:
    """Seconds for which a frame is shown whose file does not say it."""
    return 1 / float(stream.average_rate) if stream.average_rate else 0.0


def _upright(frame: Any, key: str) -> Image.Image:
    _check_size(frame.width, frame.height, key)
    image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _check_size(width: int, height: int, key: str) -> None:
    if min(width, height) < 1 or width * height > transforms.MAX_PIXELS:
        raise RecordError(
            f"{key}: frames of {width}×{height} pixels; from 1 to {transforms.MAX_PIXELS:,} in all expected",
            reason="too_large",
        )


def _name(video: str | Path | bytes) -> str:
    return "video" if isinstance(video, bytes) else str(video)
