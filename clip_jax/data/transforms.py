"""From encoded bytes to pixels: on the host up to uint8, normalised on the device or, for one image, here.

As torchvision and open_clip do: an EXIF orientation is ignored, and for evaluation an image is resized and
cropped as it is stored (palettes by nearest neighbour, alpha premultiplied, CMYK as CMYK) before it becomes RGB.
Unlike them, 16-bit greys are scaled to 8 bits; Pillow's conversion cuts them off at 255, which leaves white.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import simplejpeg
from PIL import Image, ImageEnhance, UnidentifiedImageError

from clip_jax.errors import ConfigError, RecordError

if TYPE_CHECKING:  # a process that reads pictures needs no JAX
    import jax

A = TypeVar("A", np.ndarray, "jax.Array")

# What is opened, by content and whatever it is called. Pillow knows more: of PostScript it would run the program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")

# Images above these are refused before their pixels are allocated. (Above this number Pillow warns of a bomb.)
MAX_PIXELS = 89_478_485
MAX_SIDE = 65_535

Box = tuple[float, float, float, float]  # left, top, right, bottom

SHORTER_SIDE, SQUASH = "shorter side, centre crop", "squash"
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
}


@dataclass(frozen=True)
class Augmentation:
    """What training changes in an image. The defaults are CLIP's: a random crop of 0.9–1.0 of the area.

    `scale`: area of the crop; `ratio`: its aspect; `rotate`: degrees, either way; `jitter`: of brightness
    and contrast, as a share; `grayscale`: probability; `saturation`: as a share; `flip`: probability, left to right
    (texts that say "left" are then wrong).
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotate: float = 0.0
    jitter: float = 0.0
    grayscale: float = 0.0
    saturation: float = 0.0
    flip: float = 0.0


def read_image(data: bytes, key: str) -> Image.Image:
    """Encoded bytes → an image in the mode in which it is stored, its pixels read; of several frames the first.

    Raises RecordError, naming the record, for what is no image, empty or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return accepted(image, key)
    except RecordError:
        raise
    except UnidentifiedImageError:  # its message holds an address, another one each time
        reason = "not_an_image" if data else "empty_image"
        raise RecordError(f"{key}: the image does not decode (of no known format)", reason=reason) from None
    except Exception as error:  # decoders raise many kinds; AVIF's a RuntimeError
        said = " ".join(str(error).split())[:120] or type(error).__name__
        reason = "truncated_image" if "truncated" in said.lower() else "damaged_image"
        if isinstance(error, Image.DecompressionBombError):  # Pillow's own limit is twice ours
            reason = "large_image"
        raise RecordError(f"{key}: the image does not decode ({said})", reason=reason) from None


def check_size(size: tuple[int, int], key: str) -> None:
    """Raises RecordError for an image without pixels or with too many."""
    width, height = size
    if width < 1 or height < 1:
        raise RecordError(f"{key}: an image of {width}×{height} pixels is empty", reason="damaged_image")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise RecordError(
            f"{key}: an image of {width}×{height} pixels is too large; at most {MAX_SIDE:,} a side and "
            f"{MAX_PIXELS:,} in all expected",
            reason="large_image",
        )


def accepted(image: Image.Image, key: str) -> Image.Image:
    """An image with its pixels read, of at most 8 bits a channel. Raises RecordError as `read_image` does."""
    check_size(image.size, key)
    image.load()
    if image.mode.startswith("I;16"):
        return Image.fromarray(((np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise RecordError(
            f"{key}: an image of 32-bit pixels, of unknown range; 8 or 16 bits expected", reason="unknown_range"
        )
    return image


def decode(data: bytes, key: str) -> Image.Image:
    """Encoded bytes → RGB. Raises RecordError as `read_image` does."""
    return read_image(data, key).convert("RGB")


@dataclass(frozen=True)
class Jpeg:
    """A JPEG whose pixels are not read yet: what training cuts out of it is decoded no finer than it will be seen."""

    data: bytes
    key: str
    size: tuple[int, int]

    def whole(self) -> Image.Image:
        """All of its pixels. Raises RecordError as `read_image` does."""
        return decode(self.data, self.key)

    def scaled(self, box: Box, size: int) -> tuple[Image.Image, Box]:
        """(the image at the least eighths of its size at which the box has size² pixels, the box in it).

        The eighths are the discrete cosine transform's: libjpeg-turbo reads as few frequencies as they need.
        """
        needed = size / max(min(box[2] - box[0], box[3] - box[1]), 1e-9)
        eighths = min(max(math.ceil(8 * needed), 1), 8)
        width, height = (-(-side * eighths // 8) for side in self.size)
        try:
            pixels = simplejpeg.decode_jpeg(self.data, "RGB", min_height=height, min_width=width)
        except ValueError:  # it is strict; whether the image is good is Pillow's to say
            return self.whole(), box
        height, width = pixels.shape[:2]  # a lower fraction may round to as much
        left, top, right, bottom = (side * eighths / 8 for side in box)
        return Image.fromarray(pixels), (left, top, min(right, width), min(bottom, height))


def open_image(data: bytes, key: str) -> Image.Image | Jpeg:
    """What `training_image` takes: an RGB image or, of a JPEG, what its header says. Raises RecordError as `read_image`
    does, but for a damaged JPEG, which is found to be so when it is decoded.
    """
    if data.startswith(b"\xff\xd8\xff"):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:
            colours = ""
        if colours in ("YCbCr", "Gray"):
            check_size((width, height), key)
            return Jpeg(data, key, (width, height))
    return decode(data, key)


def whole(image: Image.Image | Jpeg) -> Image.Image:
    return image.whole() if isinstance(image, Jpeg) else image


def decode_frames(data: bytes, frames: int, key: str) -> list[Image.Image]:
    """The frames of an animated image, at most `frames`, evenly spaced from the first to the last; of another, itself.

    RGB. Raises RecordError as `read_image` does.
    """
    first = read_image(data, key)  # what is wrong with it is said there
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        count = getattr(image, "n_frames", 1)
        if min(count, frames) == 1:
            return [first.convert("RGB")]
        found = []
        for place in np.linspace(0, count - 1, min(count, frames)).round().astype(int).tolist():
            try:
                image.seek(place)
                found.append(accepted(image, key).convert("RGB"))
            except (EOFError, OSError, SyntaxError, ValueError) as error:
                raise RecordError(
                    f"{key}: frame {place} does not decode ({str(error)[:120]})", reason="damaged_image"
                ) from None
    return found


def check_resizing(interpolation: str, resize_mode: str) -> None:
    """Raises ConfigError for a way of resizing that there is not."""
    if interpolation not in INTERPOLATIONS:
        raise ConfigError(f"interpolation {interpolation!r}: expected one of {', '.join(INTERPOLATIONS)}")
    if resize_mode not in (SHORTER_SIDE, SQUASH):
        raise ConfigError(f"resize_mode {resize_mode!r}: expected {SHORTER_SIDE!r} or {SQUASH!r}")


def evaluation_image(
    image: Image.Image,
    size: int,
    interpolation: str = "bicubic",
    resize_mode: str = SHORTER_SIDE,
    key: str = "image",
) -> np.ndarray:
    """An image of any mode, resized, cropped, then made RGB. Returns uint8 [size, size, 3].

    The longer side is rounded down and the crop's offset to the nearest even number, as torchvision does.
    Raises RecordError for an image that is so elongated that resizing would make it too large.
    """
    width, height = size, size
    if resize_mode == SHORTER_SIDE:
        width, height = (size * side // min(image.size) for side in image.size)
    if width * height > MAX_PIXELS:
        raise RecordError(
            f"{key}: an image of {image.size[0]}×{image.size[1]} pixels is too elongated; resized it would have "
            f"{width}×{height}",
            reason="elongated_image",
        )
    if image.size != (width, height):
        image = image.resize((width, height), INTERPOLATIONS[interpolation])
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def training_image(image: Image.Image | Jpeg, size: int, augment: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """A random resized crop, and what `augment` adds. uint8 [size, size, 3]. Raises RecordError for a damaged JPEG."""
    box = _crop_box(image.size, augment, rng)
    if isinstance(image, Jpeg):
        image, box = image.scaled(box, size)
    if augment.rotate:
        angle = math.radians(rng.uniform(-augment.rotate, augment.rotate))
        image = image.transform(
            (size, size), Image.Transform.AFFINE, turned(box, angle, size), Image.Resampling.BICUBIC,
            fillcolor=(255, 255, 255),
        )  # fmt: skip
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if augment.jitter:
        brightness, contrast = 1 + rng.uniform(-augment.jitter, augment.jitter, size=2)
        table = brightness * (128 + contrast * (np.arange(256) - 128))
        image = image.point(np.clip(np.rint(table), 0, 255).astype(int).tolist() * 3)
    if augment.grayscale and rng.random() < augment.grayscale:
        image = image.convert("L").convert("RGB")
    if augment.saturation:
        image = ImageEnhance.Color(image).enhance(1 + rng.uniform(-augment.saturation, augment.saturation))
    if augment.flip and rng.random() < augment.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image, dtype=np.uint8)


def turned(box: Box, angle: float, size: int) -> tuple[float, ...]:
    """The affine map from the pixels of the result to those of a box that is turned about its centre."""
    left, top, right, bottom = box
    sx, sy = (right - left) / size, (bottom - top) / size
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = cos * sx, -sin * sy, sin * sx, cos * sy
    x, y = (left + right) / 2, (top + bottom) / 2
    return a, b, x - (a + b) * size / 2, d, e, y - (d + e) * size / 2


def _crop_box(size: tuple[int, int], augment: Augmentation, rng: np.random.Generator) -> Box:
    width, height = size
    area = width * height * rng.uniform(*augment.scale)
    ratio = math.exp(rng.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h


def normalize(image: A, mean: Sequence[float], std: Sequence[float]) -> A:
    """uint8 [..., 3] → float32, scaled to 0–1, less the mean, over the standard deviation. Where the image is."""
    return (image.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
