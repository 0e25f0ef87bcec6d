"""What a released model does to an image before it sees it, as one value: sizes, means, way of resizing."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clip_jax.data import transforms
from clip_jax.errors import ConfigError, RecordError

# arXiv 2103.00020; SigLIP (arXiv 2303.15343) has 0.5 for all of them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocess:
    """A PIL image, a path or encoded bytes → float32 [S, S, 3], normalised: what `encode_image` takes a batch of.

    `resize_mode`: `transforms.SHORTER_SIDE` (CLIP) or `transforms.SQUASH` (SigLIP: both sides, the aspect is lost).

    Raises ConfigError for a field that makes no sense; calling it raises RecordError, which names the image,
    for one that is missing, no image, empty, too large or too elongated.
    """

    image_size: int
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD
    interpolation: str = "bicubic"
    resize_mode: str = transforms.SHORTER_SIDE

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ConfigError(f"image_size {self.image_size}: at least 1 expected")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(f"mean {self.mean}, std {self.std}: three numbers each expected, std above 0")
        transforms.check_resizing(self.interpolation, self.resize_mode)

    def __call__(self, image: Image.Image | str | Path | bytes, key: str = "") -> np.ndarray:
        """`key`: what an error calls the image; by default its path."""
        return transforms.normalize(self.pixels(image, key), self.mean, self.std)

    def pixels(self, image: Image.Image | str | Path | bytes, key: str = "") -> np.ndarray:
        """The same before it is normalised: uint8 [S, S, 3]."""
        if isinstance(image, str | Path):
            key = key or str(image)
            try:
                image = Path(image).read_bytes()
            except OSError as error:
                raise RecordError(f"{key}: can't be read ({error.strerror})") from None
        key = key or "image"
        stored = transforms.read_image(image, key) if isinstance(image, bytes) else transforms.accepted(image, key)
        return transforms.evaluation_image(stored, self.image_size, self.interpolation, self.resize_mode, key)
