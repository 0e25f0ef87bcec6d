"""Evaluation preprocessing against open_clip's (torchvision over Pillow), and what it refuses."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
from conftest import ORACLES
from PIL import Image

from clip_jax.data.preprocess import Preprocess
from clip_jax.data.transforms import SHORTER_SIDE, SQUASH
from clip_jax.errors import ConfigError, RecordError

CASE = ORACLES / "preprocess"
META = json.loads((CASE / "meta.json").read_text())
IMAGES = sorted((CASE / "images").iterdir())
SIZE = META["config"]["size"]
# Of another Pillow, pixels differ by 3/255 here and there, and those of transparent pictures wherever nothing is seen.
SAME_PILLOW = PIL.__version__.split(".")[0] == META["versions"]["pillow"].split(".")[0]


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says it is so large, whatever it holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("squash", [False, True], ids=["crop", "squash"])
@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_pixels_are_open_clips(path: Path, squash: bool) -> None:
    if path.stem.startswith("rgba") and not SAME_PILLOW:
        pytest.skip(f"of Pillow {META['versions']['pillow']}; `make test-peers` has it")
    with np.load(CASE / "expected.npz") as file:
        expected = file[f"{'squash_' if squash else ''}{path.stem}"].transpose(1, 2, 0)
    got = Preprocess(SIZE, resize_mode=SQUASH if squash else SHORTER_SIDE)(path)
    assert got.shape == (SIZE, SIZE, 3) and got.dtype == np.float32
    # Other versions of Pillow's JPEG decoder may differ by 1/255, its resize by 3/255.
    exact = META["tolerance"]["value"] if path.suffix != ".jpg" else 2e-2
    tolerance = exact if SAME_PILLOW else 5e-2
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def test_a_path_its_bytes_and_the_opened_image_are_the_same() -> None:
    preprocess, path = Preprocess(SIZE), IMAGES[0]
    expected = preprocess(path)
    for image in (str(path), path.read_bytes(), Image.open(path)):
        np.testing.assert_array_equal(preprocess(image), expected)


# (width, height) → the resized longer side and the crop's offset, by torchvision's rules: the side is
# rounded down, half an offset to the even number (Python's round).
@pytest.mark.parametrize(
    ("width", "height", "side", "offset"),
    [(100, 67, 47, 8), (67, 100, 47, 8), (33, 32, 33, 0), (35, 32, 35, 2), (37, 32, 37, 2), (39, 32, 39, 4)],
)
def test_sides_and_offsets_round_as_in_torchvision(width: int, height: int, side: int, offset: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    wide = width > height
    resized = np.asarray(image.resize((side, 32) if wide else (32, side), Image.Resampling.BICUBIC))
    cut = slice(offset, offset + 32)
    expected = (resized[:, cut] if wide else resized[cut]) / 127.5 - 1
    got = Preprocess(32, mean=(0.5,) * 3, std=(0.5,) * 3)(image)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_sixteen_bit_greys_keep_their_range() -> None:
    ramp = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    got = Preprocess(32, mean=(0.0,) * 3, std=(1.0,) * 3)(file.getvalue())
    np.testing.assert_allclose(got, np.repeat(ramp[..., None] / 65535, 3, -1), atol=0.5001 / 255)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2000)])
def test_extreme_aspects_are_cropped_to_their_middle(size: tuple[int, int]) -> None:
    got = Preprocess(16, mean=(0.0,) * 3, std=(1.0,) * 3)(Image.new("RGB", size, (255, 0, 51)))
    np.testing.assert_allclose(got, np.full((16, 16, 3), [1, 0, 0.2]))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(0, 5), "does not decode|is empty"),
        (png(100_000, 1, bytes(100_001)), "an image of 100000×1 pixels is too large"),
        (png(1, 100_000, bytes(200_000)), "an image of 1×100000 pixels is too large"),
        (png(9_500, 9_500), "an image of 9500×9500 pixels is too large"),
        (png(60_000, 60_000), "decompression bomb"),
        (png(1, 60_000, bytes(120_000)), r"an image of 1×60000 pixels is too elongated; resized it would have 224×134"),
        (b"", "does not decode"),
        (b"GIF89a", "does not decode"),
    ],
    ids=["0×5", "100000×1", "1×100000", "9500×9500", "60000×60000", "1×60000", "nothing", "signature"],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_no_reasonable_image_is_refused_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(RecordError, match=f"^a/b.png: .*({reason})") as caught:
        Preprocess(224)(data, "a/b.png")
    assert "\n" not in str(caught.value)


def test_images_given_as_such_are_checked_too() -> None:
    for image in (Image.new("L", (0, 7)), Image.new("1", (70_000, 1)), Image.new("F", (5, 5))):
        with pytest.raises(RecordError, match="^image: an image of"):
            Preprocess(16)(image)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"none.png: can't be read \(No such file"):
        Preprocess(16)(tmp_path / "none.png")
    with pytest.raises(RecordError, match="can't be read"):
        Preprocess(16)(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"image_size": 0}, {"mean": (0.5,)}, {"std": (0.5, 0.0, 0.5)}, {"interpolation": "cubic"}, {"resize_mode": "x"}],
)
def test_fields_that_make_no_sense_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Preprocess(**{"image_size": 16} | fields)
