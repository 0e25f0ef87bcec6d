"""From encoded bytes to pixels: on the host up to uint8, on the device from there on."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, UnidentifiedImageError

from clip_jax.errors import RecordError

# A decoded image above this is refused before its pixels are allocated.
MAX_PIXELS = 100_000_000


@dataclass(frozen=True)
class Augmentation:
    """What training changes in an image. The defaults are CLIP's: a random crop of 0.9–1.0 of the area.

    `scale`: area of the crop; `ratio`: its aspect; `rotate`: degrees, either way; `jitter`: of brightness
    and contrast, as a share; `grayscale`: probability.
    """

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    rotate: float = 0.0
    jitter: float = 0.0
    grayscale: float = 0.0


def decode(data: bytes, key: str) -> Image.Image:
    """Encoded bytes → RGB. Raises RecordError, naming the record, for what is no image or too large."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise RecordError(f"{key}: an image of {image.size[0]}×{image.size[1]} pixels is too large")
            return image.convert("RGB")
    except RecordError:
        raise
    except UnidentifiedImageError:  # its message holds an address, another one each time
        raise RecordError(f"{key}: the image does not decode (of no known format)") from None
    except Exception as error:  # decoders raise many kinds; AVIF's a RuntimeError
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise RecordError(f"{key}: the image does not decode ({reason})") from None


def evaluation_image(image: Image.Image, size: int) -> np.ndarray:
    """Shorter side to `size` (bicubic), centre crop. Returns uint8 [size, size, 3]."""
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image, dtype=np.uint8)


def training_image(image: Image.Image, size: int, augment: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """A random resized crop, never flipped (texts say "left"), and what `augment` adds. uint8 [size, size, 3]."""
    box = _crop_box(image.size, augment, rng)
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
    return np.asarray(image, dtype=np.uint8)


def turned(box: tuple[float, float, float, float], angle: float, size: int) -> tuple[float, ...]:
    """The affine map from the pixels of the result to those of a box that is turned about its centre."""
    left, top, right, bottom = box
    sx, sy = (right - left) / size, (bottom - top) / size
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = cos * sx, -sin * sy, sin * sx, cos * sy
    x, y = (left + right) / 2, (top + bottom) / 2
    return a, b, x - (a + b) * size / 2, d, e, y - (d + e) * size / 2


def _crop_box(
    size: tuple[int, int], augment: Augmentation, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    width, height = size
    area = width * height * rng.uniform(*augment.scale)
    ratio = math.exp(rng.uniform(math.log(augment.ratio[0]), math.log(augment.ratio[1])))
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
    return left, top, left + w, top + h


def normalize(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 [..., 3] → float32, scaled to 0–1, less the mean, over the standard deviation. On the device."""
    scaled = image.astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
