"""What curation knows of a pair: a row of numbers, found in one look at the pair, by which all else is decided.

A row is some 150 bytes, whatever the size of the image; duplicates, balance and counts work on rows alone, and the
source is read again only for the pairs that stay.
"""

import hashlib
import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from clip_jax.data import transforms
from clip_jax.data.curation.matching import Matcher
from clip_jax.data.curation.texts import normal
from clip_jax.data.sources import Pair
from clip_jax.errors import RecordError

SCHEMA = pa.schema({
    "index": pa.int64(),  # in the source
    "rank": pa.int64(),  # a hash: of pairs that compete, the smallest stays
    "reason": pa.string(),  # why it is left out, or ""
    "image": pa.binary(16),  # digest of the encoded image
    "text": pa.binary(16),  # digest of the text's normal form
    "perceptual": pa.int64(),  # 64 bits of which similar images share most
    "queries": pa.list_(pa.int32()),
})  # fmt: skip
RANKS = 1 << 63  # a rank is below it


@dataclass(frozen=True)
class Filters:
    """What a pair must be. Texts are measured in characters; `languages` as ISO 639-1 names them, any where empty."""

    min_side: int = 64
    max_aspect: float = 3.0
    min_text: int = 5
    max_text: int = 1000
    languages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    index: int
    rank: int = 0
    reason: str = ""
    image: bytes = bytes(16)
    text: bytes = bytes(16)
    perceptual: int = 0
    queries: list[int] = field(default_factory=list)


class Inspector:
    """Makes rows of pairs. Holds the automaton and the language model: one for each worker."""

    def __init__(self, matcher: Matcher, filters: Filters, seed: int):
        self._matcher, self._filters, self._seed = matcher, filters, seed
        self._language: Any = None
        if filters.languages:
            import py3langid

            self._language = py3langid

    def row(self, index: int, pair: Pair) -> Row:
        """Matched whatever the filters say, so that the counts before them are known, too."""
        image = digest(pair.image)
        text = normal(pair.text)
        queries = sorted({i for caption in pair.captions or (pair.text,) for i in self._matcher.find(caption)})
        reason, perceptual = self._text_fault(text), 0
        if not reason:
            try:
                perceptual = self._look(pair)
            except RecordError as error:
                reason = error.reason
        return Row(index, rank(self._seed, pair, image), reason, image, digest(text.encode()), perceptual, queries)

    def _text_fault(self, text: str) -> str:
        if len(text) < self._filters.min_text:
            return "short_text"
        if len(text) > self._filters.max_text:
            return "long_text"
        if self._language and self._language.classify(text)[0] not in self._filters.languages:
            return "language"
        return ""

    def _look(self, pair: Pair) -> int:
        """The image's perceptual hash. Raises RecordError, with the reason, for one that won't do."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a size that Pillow warns of is refused by `accepted`
                image = Image.open(io.BytesIO(pair.image))
            with image:
                width, height = image.size
                if min(width, height) < self._filters.min_side:
                    raise RecordError(f"{pair.key}: {width}×{height} pixels", reason="small_image")
                if max(width, height) > self._filters.max_aspect * min(width, height):
                    raise RecordError(f"{pair.key}: {width}×{height} pixels", reason="long_image")
                image.draft("RGB", (64, 64))  # a JPEG is decoded at an eighth of its size, if that is large enough
                return perceptual_hash(transforms.accepted(image, pair.key).convert("RGB"))
        except RecordError as error:
            raise error if error.reason != "other" else RecordError(str(error), reason="unreadable_image") from None
        except UnidentifiedImageError:
            raise RecordError(f"{pair.key}: of no known format", reason="unreadable_image") from None
        except Exception as error:  # decoders raise many kinds
            raise RecordError(f"{pair.key}: {error}", reason="unreadable_image") from None


def digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def rank(seed: int, pair: Pair, image: bytes) -> int:
    """Where a pair stands in a random order of all pairs, a function of the seed and of what the pair is: [0, 2⁶³)."""
    parts = [text.encode("utf-8", "surrogatepass") for text in (pair.key, pair.text)]
    hashed = hashlib.blake2b(b"\0".join([*parts, image]), digest_size=8, key=str(seed).encode())
    return int.from_bytes(hashed.digest()) >> 1


def perceptual_hash(image: Image.Image) -> int:
    """imagehash's pHash: which of 64 low frequencies are above their median. As a signed integer."""
    import imagehash

    bits = imagehash.phash(image).hash
    return int(np.packbits(bits).view(">i8")[0])


def columns(rows: Iterable[Row]) -> dict[str, list[Any]]:
    rows = list(rows)
    return {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
