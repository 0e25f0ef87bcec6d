"""Frames of real video files, written here by FFmpeg's encoders; and one clear line for those that are none."""

import io
import threading
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from clip_jax.data import transforms
from clip_jax.errors import ConfigError, RecordError
from flamingo_jax.data import video
from flamingo_jax.data.video import read_clip, read_frames

RATE = 10  # frames a second


def grey(number: int) -> int:
    """Of frame `number` (0 to 49): one of 50, each 4 from the next one."""
    return 20 + 4 * (number * 7 % 50)


def write(path: Path, codec: str, frames: int, size: tuple[int, int] = (64, 48), rotation: int = 0) -> Path:
    """Grey frames, of which the left edge is red."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=RATE)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), grey(i), np.uint8)
            pixels[:, : size[0] // 8] = (255, 0, 0)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 seconds of H.264."""
    return write(tmp_path_factory.mktemp("video") / "clip.mp4", "libx264", 5 * RATE)


def numbers(frames: list[Image.Image]) -> list[int]:
    """Which frame each is, by the grey of its middle."""
    greys = np.array([grey(i) for i in range(5 * RATE)])
    found = []
    for frame in frames:
        middle = float(np.asarray(frame)[20:28, 28:36].mean())
        found.append(int(np.abs(greys - middle).argmin()))
        assert abs(greys[found[-1]] - middle) < 1.5
    return found


@pytest.mark.parametrize(
    ("frames", "fps", "start", "expected"),
    [
        (5, 1.0, 0.0, [0, 10, 20, 30, 40]),
        (4, 1.0, 1.95, [19, 29, 39, 49]),  # frame 19 is shown from 1.9 to 2.0 s
        (4, 3.0, 0.0, [0, 3, 6, 10]),
        (3, 20.0, 0.3, [3, 3, 4]),  # more often than the video's own rate
        (1, 1.0, 4.99, [49]),
    ],
)
def test_frames_are_those_shown_at_the_times(
    mp4: Path, frames: int, fps: float, start: float, expected: list[int]
) -> None:
    assert numbers(read_frames(mp4, frames, fps, start)) == expected


@pytest.mark.parametrize(("codec", "suffix"), [("libvpx-vp9", ".webm"), ("mpeg4", ".avi"), ("libvpx", ".mkv")])
def test_other_formats_and_bytes_are_read_alike(tmp_path: Path, codec: str, suffix: str) -> None:
    path = write(tmp_path / f"clip{suffix}", codec, 15)
    assert suffix in video.VIDEO_SUFFIXES
    assert numbers(read_frames(path, 2, 1.0)) == [0, 10]
    clip = read_clip(path.read_bytes(), 2, 1.0, size=24)
    assert clip.shape == (2, 24, 24, 3) and clip.dtype == np.uint8
    np.testing.assert_array_equal(clip, read_clip(path, 2, 1.0, size=24))
    np.testing.assert_array_equal(clip[0], transforms.evaluation_image(read_frames(path, 1)[0], 24))


def test_a_phones_video_is_turned_upright(tmp_path: Path) -> None:
    path = write(tmp_path / "turned.mp4", "libx264", 3, rotation=90)
    (frame,) = read_frames(path, 1)
    assert frame.size == (48, 64)
    pixels = np.asarray(frame).astype(int)
    red = pixels[..., 0] - pixels[..., 1] > 100  # the left edge, counterclockwise: the bottom
    assert red[-6:].mean() > 0.9 and not red[:50].any()


def test_what_is_no_clip_is_one_line(mp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordError, match=r"^record 7: a video of 5\.00 s; 8 frames, the last at 7\.00 s, expected$"):
        read_clip(mp4, key="record 7")
    with pytest.raises(RecordError, match=r"clip\.mp4: a video of 5\.00 s; 1 frames, the last at 9\.00 s, expected"):
        read_clip(mp4, 1, start=9.0)
    whole = mp4.read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "empty": b"", "noise": bytes(range(256)) * 8}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(RecordError, match=rf"{name}: the video does not decode \(.+\)$"):
            read_clip(tmp_path / name)
    with pytest.raises(RecordError, match=r"none\.mp4: the video does not decode \(No such file or directory\)$"):
        read_clip(tmp_path / "none.mp4")
    with pytest.raises(RecordError, match=r"^video: the video does not decode"):
        read_clip(whole[-500:])
    for arguments in ({"frames": 0}, {"fps": 0.0}, {"fps": float("nan")}, {"start": -1.0}):
        with pytest.raises(ConfigError, match="expected at least 1, above 0, and from 0 on"):
            read_clip(mp4, **arguments)
    monkeypatch.setattr(transforms, "MAX_PIXELS", 2000)
    with pytest.raises(RecordError, match=r"frames of 64×48 pixels; from 1 to 2,000 in all expected"):
        read_clip(mp4, 1)


def test_damage_within_a_file_is_one_line_or_frames(mp4: Path) -> None:
    """Whatever byte is wrong: frames, or RecordError."""
    rng, whole = np.random.default_rng(0), mp4.read_bytes()
    outcomes = set()
    for _ in range(40):
        data = bytearray(whole)
        for at in rng.integers(len(data), size=rng.integers(1, 21)):
            data[at] = rng.integers(256)
        try:
            outcomes.add(len(read_clip(bytes(data), 4, size=16)))
        except RecordError as error:
            assert "\n" not in str(error)
            outcomes.add(0)
    assert outcomes == {0, 4}


def test_a_table_too_large_for_memory_is_a_damaged_file(mp4: Path) -> None:
    """FFmpeg's error is a MemoryError, too, which the readers of data must not take for the machine's."""
    data = bytearray(mp4.read_bytes())
    count = data.find(b"stts") + 8  # of the table of durations
    data[count : count + 4] = (2**28).to_bytes(4, "big")
    with pytest.raises(RecordError, match="the video does not decode .Cannot allocate memory"):
        read_clip(bytes(data), 1)


def test_a_playlist_opens_nothing(tmp_path: Path, mp4: Path) -> None:
    """FFmpeg would follow the names in a playlist, over the network, too."""
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{mp4}\n#EXT-X-ENDLIST\n")
    (tmp_path / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {mp4}\n")
    for name in ("list.mp4", "concat.mp4"):
        with pytest.raises(RecordError, match="the video does not decode"):
            read_clip(tmp_path / name, 1)


def test_decoding_has_an_end(mp4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_DECODED", 12)
    assert len(read_frames(mp4, 2)) == 2
    with pytest.raises(RecordError, match="12 frames decoded without an end"):
        read_frames(mp4, 4)


def test_threads_read_at_once(mp4: Path) -> None:
    found: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: found.append(read_clip(mp4, 3, size=16))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(clip, found[0]) for clip in found)


def test_sound_alone_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream: Any = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        for packet in [*stream.encode(sound), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(RecordError, match=r"^video: no pictures in it$"):
        read_clip(file.getvalue())
