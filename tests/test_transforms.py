"""From encoded bytes to pixels, and from pixels to numbers."""

import io
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from clip_jax.data import transforms
from clip_jax.data.order import generator
from clip_jax.data.transforms import Augmentation, decode, evaluation_image, normalize, training_image
from clip_jax.errors import RecordError

EVERYTHING = Augmentation(scale=(0.5, 1.0), rotate=10.0, jitter=0.4, grayscale=0.5)


def noise(width: int = 40, height: int = 30, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG = encode(Image.fromarray(noise()))
JPEG = encode(Image.fromarray(noise()), "JPEG")
WEBP = encode(Image.fromarray(noise()), "WEBP")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b"\x00" * 100,
        PNG[:8],
        PNG[:40],
        PNG[: len(PNG) // 2],
        JPEG[: len(JPEG) // 2],
        WEBP[:50],
    ],
    ids=["empty", "text", "zeros", "signature", "header", "half-png", "half-jpeg", "cut-webp"],
)
def test_decode_refuses_what_is_no_image(data: bytes) -> None:
    with pytest.raises(RecordError, match="^shard/17: the image does not decode") as caught:
        decode(data, "shard/17")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("line 1\nline 2"), OSError(), EOFError("end"), IndexError()])
def test_decode_refuses_whatever_the_decoder_raises(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(RecordError, match="^shard/17: the image does not decode") as caught:
        decode(PNG, "shard/17")
    assert "\n" not in str(caught.value)


def test_decode_refuses_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "MAX_PIXELS", 40 * 30 - 1)
    with pytest.raises(RecordError, match="shard/17: .*40×30"):
        decode(PNG, "shard/17")


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_decode_keeps_rgb_pixels(kind: str) -> None:
    image = decode(encode(Image.fromarray(noise()), kind, lossless=True), "k")
    np.testing.assert_array_equal(np.asarray(image), noise())


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("LA", "PNG"), ("L", "PNG"), ("1", "PNG"), ("I;16", "PNG")]
    + [("CMYK", "JPEG"), ("L", "JPEG"), ("CMYK", "TIFF"), ("RGBA", "WEBP")],
)
def test_decode_gives_rgb(mode: str, kind: str) -> None:
    rgb = Image.fromarray(noise())
    source = Image.fromarray(noise()[..., 0].astype(np.uint16)) if mode == "I;16" else rgb.convert(mode)
    image = decode(encode(source, kind), "k")
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_decode_converts_grayscale_and_palette_exactly() -> None:
    gray = noise()[..., 0]
    image = decode(encode(Image.fromarray(gray)), "k")
    np.testing.assert_array_equal(np.asarray(image), np.repeat(gray[..., None], 3, axis=-1))
    palette = Image.fromarray(noise()).convert("P")
    np.testing.assert_array_equal(np.asarray(decode(encode(palette), "k")), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (31, 97), (97, 31), (48, 49), (224, 225), (1000, 33)])
def test_evaluation_image_is_square(size: tuple[int, int]) -> None:
    pixels = evaluation_image(Image.new("RGB", size, (10, 20, 30)), 32)
    assert (pixels.shape, pixels.dtype) == ((32, 32, 3), np.uint8)
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.array([10, 20, 30], np.uint8), (32, 32, 3)))


@pytest.mark.parametrize(("width", "height"), [(32, 32), (57, 32), (32, 58), (33, 32), (320, 32)])
def test_evaluation_image_is_a_plain_centre_crop_where_one_side_fits(width: int, height: int) -> None:
    pixels = noise(width, height)
    top, left = (height - 32) // 2, (width - 32) // 2
    expected = pixels[top : top + 32, left : left + 32]
    np.testing.assert_array_equal(evaluation_image(Image.fromarray(pixels), 32), expected)


def test_evaluation_image_keeps_the_aspect() -> None:
    # Twice the size, twice as wide as high: the centre half is white, the rest black.
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 48:80] = 255
    image = evaluation_image(Image.fromarray(pixels), 32)
    assert (image[:, 10:22] > 250).all()
    assert (image[:, :6] < 5).all() and (image[:, 26:] < 5).all()


@pytest.mark.parametrize("augment", [Augmentation(), EVERYTHING], ids=["default", "everything"])
def test_training_image_is_a_function_of_the_key(augment: Augmentation) -> None:
    image = Image.fromarray(noise())

    def draw(key: int) -> np.ndarray:
        return training_image(image, 16, augment, generator(key))

    assert draw(0).shape == (16, 16, 3) and draw(0).dtype == np.uint8
    np.testing.assert_array_equal(draw(0), draw(0))
    assert len({draw(key).tobytes() for key in range(10)}) == 10
    np.testing.assert_array_equal(np.asarray(image), noise())  # the image itself stays as it is


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (200, 3), (16, 16)])
def test_training_image_takes_any_aspect(size: tuple[int, int]) -> None:
    for key in range(20):
        pixels = training_image(Image.new("RGB", size, (9, 8, 7)), 16, Augmentation(), generator(key))
        np.testing.assert_array_equal(pixels, np.broadcast_to(np.array([9, 8, 7], np.uint8), (16, 16, 3)))


def photo(width: int, height: int) -> Image.Image:
    """Soft colours with edges in them, as a photograph has."""
    rng = np.random.default_rng(width)
    pixels = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    image.paste((250, 240, 30), (width // 5, height // 4, width // 3, height // 2))
    return image


SHRUNK = [(640, 480, 4), (480, 640, 4), (500, 375, 5), (300, 250, 8), (1501, 1003, 2), (4001, 230, 8)]


@pytest.mark.parametrize(("width", "height", "eighths"), SHRUNK)
def test_a_jpeg_is_decoded_no_finer_than_its_crop_is_seen(width: int, height: int, eighths: int) -> None:
    image = photo(width, height)
    for colours in ("RGB", "L"):
        data, augment = encode(image.convert(colours), "JPEG", quality=90), Augmentation(scale=(0.98, 1.0))
        opened = transforms.open_image(data, "k")
        assert isinstance(opened, transforms.Jpeg) and opened.size == (width, height)
        fine, _ = opened.scaled((0, 0, width, height), 224)
        assert fine.size == (-(-width * eighths // 8), -(-height * eighths // 8))
        for key in range(2):
            fast = training_image(opened, 224, augment, generator(key)).astype(int)
            exact = training_image(decode(data, "k"), 224, augment, generator(key)).astype(int)
            off = np.abs(fast - exact)
            assert off.mean() < 1.2 and np.percentile(off, 99) < 12
            assert off.any() == (eighths < 8)
            # No shift: moved by half a pixel of the result, the two would differ far more.
            assert off.mean() < 0.7 * np.abs(fast - np.roll(exact, 1, axis=1)).mean()


def test_training_image_is_never_flipped() -> None:
    ramp = np.repeat(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None], 32, 0).repeat(3, -1)
    for key in range(20):
        row = training_image(Image.fromarray(ramp), 16, Augmentation(), generator(key))[8, :, 0].astype(int)
        assert row[0] < row[-1]


def test_crops_stay_inside_and_cover_the_area() -> None:
    augment = Augmentation(scale=(0.5, 0.9), ratio=(1.0, 1.0))
    for key in range(200):
        left, top, right, bottom = transforms._crop_box((100, 100), augment, generator(key))
        assert 0 <= left < right <= 100 + 1e-9 and 0 <= top < bottom <= 100 + 1e-9
        assert 0.5 <= (right - left) * (bottom - top) / 100**2 <= 0.9 + 1e-9
        assert math.isclose(right - left, bottom - top)


def test_normalize_against_float64() -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    image = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1).reshape(16, 16, 3)
    expected = (image.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    result = normalize(jnp.asarray(image), mean, std)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)
