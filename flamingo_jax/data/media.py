"""Pages: texts, and media between them that are not decoded yet; and how they are decoded."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from clip_jax.data import transforms
from clip_jax.data.sources import storage
from clip_jax.data.sources.records import MAX_IMAGE
from clip_jax.errors import RecordError
from flamingo_jax.data.documents import EndOfChunk, Text
from flamingo_jax.data.video import VIDEO_SUFFIXES, read_frames

MAX_CHARACTERS = 1_000_000  # of a page: a longer one is no page, and tokenising it takes minutes
MAX_CLIP = 1 << 31  # bytes of a clip that is read whole: of one in a tar


@dataclass(frozen=True)
class Span:
    """A file within a file, on a disk or in a bucket: a tar's member."""

    name: str
    path: str
    start: int
    size: int

    def read(self) -> bytes:
        """Raises RecordError where the outer file ends before it or, in a bucket, can't be read."""
        if storage.is_remote(self.path):
            return storage.read_ranges(self.path, [(self.start, self.size)], f"{self.path}/{self.name}")[0]
        with Path(self.path).open("rb") as file:
            data = os.pread(file.fileno(), self.size, self.start)
        if len(data) != self.size:
            raise RecordError(f"{self.path}/{self.name}: cut off", reason="cut_off")
        return data


@dataclass(frozen=True)
class Raw:
    """An image, still encoded, or the file of an image or clip."""

    where: bytes | Path | Span

    @property
    def path(self) -> str:
        """Of its file, or of the tar and the file in it; "" for bytes."""
        if isinstance(self.where, Span):
            return f"{self.where.path}/{self.where.name}"
        return "" if isinstance(self.where, bytes) else str(self.where)

    @property
    def is_video(self) -> bool:
        return Path(self.path).suffix.lower() in VIDEO_SUFFIXES

    def read(self, key: str) -> bytes:
        """The encoded bytes. Raises RecordError, naming the file, where it can't be read or is too large."""
        if isinstance(self.where, bytes):
            return self.where
        most = MAX_CLIP if self.is_video else MAX_IMAGE
        try:
            size = self.where.size if isinstance(self.where, Span) else _size_of_file(self.where)
            if size > most:
                raise RecordError(f"{self.path}: {size:,} bytes; at most {most:,} expected", reason="large_image")
            return self.where.read() if isinstance(self.where, Span) else self.where.read_bytes()
        except (OSError, ValueError) as error:  # a ValueError: a name that no file can have
            reason = getattr(error, "strerror", None) or str(error)
            raise RecordError(f"{self.path[:300]}: can't be read ({reason})", reason="can_not_be_read") from None


def _size_of_file(path: Path) -> int:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # a pipe may never end
        raise ValueError("no file")
    return status.st_size


@dataclass(frozen=True)
class Page:
    """A document whose media are not decoded yet. `dropped`: why some of its images were left out, a reason for each.

    Raises RecordError for texts that are too long together, or no valid Unicode.
    """

    key: str
    parts: Sequence[Raw | Text | EndOfChunk]
    dropped: Sequence[str] = ()

    def __post_init__(self) -> None:
        texts = [part.text for part in self.parts if isinstance(part, Text)]
        if (length := sum(map(len, texts))) > MAX_CHARACTERS:
            raise RecordError(
                f"{self.key}: {length:,} characters; at most {MAX_CHARACTERS:,} expected", reason="text_too_long"
            )
        try:
            "".join(texts).encode()
        except UnicodeEncodeError as error:
            where = f"character {error.start} is half a character"
            raise RecordError(f"{self.key}: not valid Unicode ({where})", reason="text_not_unicode") from None

    @property
    def media(self) -> list[Raw]:
        return [part for part in self.parts if isinstance(part, Raw)]


class PageSource(Protocol):
    """`pages[i]` raises RecordError, which names the record, for one that can't be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Page: ...


def decode(raw: Raw, frames: int, key: str) -> list[Image.Image]:
    """The image, or as many frames of the clip, as RGB: of a video at 1 a second, of an animated image evenly spaced.

    Raises RecordError, naming the file or `key`, for what does not decode.
    """
    if isinstance(raw.where, bytes):
        return [transforms.decode(raw.where, key)]
    key = raw.path or key
    if raw.is_video:
        return read_frames(raw.where if isinstance(raw.where, Path) else raw.read(key), frames, key=key)
    return transforms.decode_frames(raw.read(key), frames, key)
