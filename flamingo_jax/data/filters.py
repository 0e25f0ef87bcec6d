"""What leaves a page out, and what stands in its place."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import parse_qsl

from clip_jax.data.order import mix
from clip_jax.errors import DataError, RecordError
from flamingo_jax.data.media import Page, PageSource

MAX_REPLACED = 1000  # pages left out in a row, after which the filters are taken to leave nothing


class LeftOutError(RecordError):
    """A page that is sound, and that a filter leaves out."""


@dataclass(frozen=True)
class Filters:
    """The filters of the published data sets and of those who trained on them.

    min_similarity: of an image and its sentence by CLIP; less, and the image is left out (OpenFlamingo: 0.24).
    min_bytes: of an encoded image (OpenFlamingo: 10,000).
    min_images, max_images: of a page, after that; others are left out (OBELICS and MMC4: 1 to 30; 0: any number).
    single_rate: the share of the pages with one image that is kept (OpenFlamingo: 0.5).
    faces, nsfw, duplicates: "keep" or "drop" images with `face_detections`, images marked `nsfw`, and pages that
      `could_have_url_duplicate`.
    """

    min_similarity: float = -1.0
    min_bytes: int = 0
    min_images: int = 1
    max_images: int = 0
    single_rate: float = 1.0
    faces: str = "keep"
    nsfw: str = "drop"
    duplicates: str = "keep"

    def check(self, key: str, images: int, record: Mapping[str, Any], number: int) -> None:
        """Raises LeftOutError for a page of so many images; `number` draws for those with one."""
        if self.duplicates == "drop" and record.get("could_have_url_duplicate"):
            raise LeftOutError(f"{key}: its address may stand twice in the data", reason="may_be_a_duplicate")
        if images < self.min_images:
            raise LeftOutError(
                f"{key}: {images} images left; at least {self.min_images} expected", reason="too_few_images"
            )
        if self.max_images and images > self.max_images:
            raise LeftOutError(f"{key}: {images} images; at most {self.max_images} expected", reason="too_many_images")
        if images == 1 and mix(number, 11) >= self.single_rate * 2**64:
            raise LeftOutError(f"{key}: one image, and not among the share that is kept", reason="one_image")

    def image_refused(self, info: Mapping[str, Any], similarity: float, size: int | None) -> str:
        """Why an image is left out; "" where it is not."""
        if similarity < self.min_similarity:
            return "low_similarity"
        if self.faces == "drop" and info.get("face_detections"):
            return "faces"
        if self.nsfw == "drop" and marked_nsfw(info):
            return "marked_nsfw"
        return "too_few_bytes" if size is not None and size < self.min_bytes else ""


def marked_nsfw(info: Mapping[str, Any]) -> bool:
    """By a field `nsfw` or `NSFW`: true, a probability from ½ on, or LAION's NSFW (not UNSURE, UNLIKELY)."""
    mark = info.get("nsfw", info.get("NSFW"))
    if isinstance(mark, str):
        return mark.strip().lower() in ("nsfw", "true", "yes", "1", "likely", "porn", "sexy", "hentai")
    return isinstance(mark, int | float) and mark >= 0.5


_TYPES: dict[type, Callable[[str], Any]] = {int: int, float: float, str: str}


def cut_options(spec: str) -> tuple[str, str, dict[str, str]]:
    """WHERE#IMAGES?KEY=VALUE&… → (where, images or "", options)."""
    rest, _, options = spec.partition("?")
    where, _, images = rest.partition("#")
    return where, images, dict(parse_qsl(options, keep_blank_values=True))


def read_options(kind: type[Any], options: Mapping[str, str], spec: str) -> Any:
    """A dataclass of numbers and of "keep" or "drop" from texts. Raises DataError for others."""
    defaults = {field.name: field.default for field in fields(kind)}
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in defaults:
            raise DataError(f"{spec}: option {name!r}: expected one of {', '.join(defaults)}")
        try:
            values[name] = _TYPES[type(defaults[name])](text)
        except ValueError:
            raise DataError(f"{spec}: {name}={text}: expected a number") from None
        if isinstance(values[name], str) and text not in ("keep", "drop"):
            raise DataError(f"{spec}: {name}={text}: expected keep or drop")
        if isinstance(values[name], float) and not math.isfinite(values[name]):
            raise DataError(f"{spec}: {name}={text}: expected a finite number")
    return kind(**values)


@dataclass(frozen=True)
class Refilled:
    """A source in which another page stands in the place of one that a filter leaves out; which, its index says.

    A damaged page is none of the filter's, and stays RecordError.
    """

    source: PageSource

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Page:
        place = index
        for attempt in range(1, MAX_REPLACED + 1):
            try:
                return self.source[place]
            except LeftOutError as error:
                last = error
            place = mix(index, attempt, 13) % len(self.source)
        raise DataError(f"{MAX_REPLACED} pages in a row were left out by filters, the last one: {last}")
