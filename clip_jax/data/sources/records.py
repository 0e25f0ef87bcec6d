"""What every source of image–text pairs gives, and what may stand in a field of one."""

import json
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

from clip_jax.data.sources import storage
from clip_jax.errors import DataError, RecordError

ASSETS = Path(__file__).parent.parent / "assets"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
# What an image and a text are called in the tables that are about; the first that there is counts.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "image_path", "filepath", "file_path",
                 "file_name", "filename", "path")  # fmt: skip
TEXT_COLUMNS = ("text", "txt", "caption", "captions", "title", "TEXT", "alt_text", "label")
MAX_TEXT = 1_000_000  # bytes: a longer caption is no caption, and would hold up a tokenizer for seconds
MAX_IMAGE = 1 << 28  # bytes of an encoded image


@dataclass(frozen=True)
class Pair:
    """An image, still encoded, and its text; of several captions the first, and all of them in `captions`."""

    key: str
    image: bytes
    text: str
    keywords: tuple[str, ...] = ()
    group: str = ""
    style: str = ""
    captions: tuple[str, ...] = ()


class PairSource(Protocol):
    """`source[i]` raises RecordError, which names the record, for one that can't be used.

    A source whose texts are names of classes may have `classes`, all of them in their order; one that can tell the
    captions of a record without reading its image may have `captions(index)`.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Pair: ...


def make_pair(key: str, image: bytes, captions: Sequence[str]) -> Pair:
    return Pair(key, image, captions[0], captions=tuple(captions) if len(captions) > 1 else ())


def printable(text: str) -> str:
    """A name for messages: one line, whatever it holds."""
    return text if text.isprintable() else text.encode("unicode_escape", "backslashreplace").decode()


def choose(columns: Sequence[str], asked: str, known: Sequence[str], what: str, where: str) -> str:
    """The column that was asked for or, by default, the first known one. Raises DataError naming those there are."""
    found = [name for name in ((asked,) if asked else known) if name in columns]
    if not found:
        there = ", ".join(map(printable, columns[:50])) or "none"
        raise DataError(f"{where}: columns {there}; expected {asked or 'one of ' + ', '.join(known)} for the {what}")
    return found[0]


def json_object(data: bytes, key: str) -> dict[str, Any]:
    """An object in JSON. Raises RecordError, naming the record, for anything else."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "not_utf8" if isinstance(error, UnicodeError) else "bad_json"
        raise RecordError(f"{key}: not JSON ({storage.first_line(error)})", reason=reason) from None
    if not isinstance(record, dict):
        raise RecordError(f"{key}: JSON of a {type(record).__name__}; expected an object", reason="wrong_type")
    return record


def read_captions(value: Any, key: str, classes: Sequence[str] | None = None) -> tuple[str, ...]:
    """The captions in a field: a text, UTF-8 bytes, several of them, or a class's number.

    Raises RecordError, naming the record, for anything else, for texts that are empty and for those above MAX_TEXT.
    """
    if value is None or (isinstance(value, list | tuple) and not value):
        raise RecordError(f"{key}: no caption", reason="missing_caption")
    if isinstance(value, list | tuple):
        return tuple(caption for one in value for caption in read_captions(one, key, classes))
    if classes is not None:
        try:
            number = int(value)
        except (TypeError, ValueError):
            raise RecordError(f"{key}: no class's number where one was expected", reason="wrong_type") from None
        if not 0 <= number < len(classes):
            raise RecordError(f"{key}: class {number}; expected 0 to {len(classes) - 1}", reason="wrong_type")
        return (classes[number],)
    if not isinstance(value, str | bytes):
        raise RecordError(f"{key}: the caption is a {type(value).__name__}; expected a text", reason="wrong_type")
    if len(value) > MAX_TEXT:
        raise RecordError(f"{key}: a caption of {len(value):,}; at most {MAX_TEXT:,} expected", reason="long_caption")
    try:
        text = value.decode("utf-8") if isinstance(value, bytes) else value
        text.encode("utf-8")  # half a surrogate pair, which JSON may spell
    except UnicodeError as error:
        raise RecordError(f"{key}: the caption is not UTF-8 ({error.reason})", reason="not_utf8") from None  # type: ignore[attr-defined]
    text = text.strip()
    if not text:
        raise RecordError(f"{key}: the text is empty", reason="empty_caption")
    return (text,)


def read_image(value: Any, key: str, folder: str) -> bytes:
    """The encoded image in a field: bytes, a path from `folder`, or Hugging Face's {bytes, path}.

    Raises RecordError, naming the record, for anything else, and for a file that can't be read.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        raise RecordError(f"{key}: no image", reason="missing_image")
    if isinstance(value, str):
        value = read_image_file(value, key, folder)
    if not isinstance(value, bytes):
        raise RecordError(
            f"{key}: the image is a {type(value).__name__}; expected bytes or a path", reason="wrong_type"
        )
    return checked_image(value, key)


def checked_image(data: bytes, key: str) -> bytes:
    if not data:
        raise RecordError(f"{key}: the image has 0 bytes", reason="empty_image")
    if len(data) > MAX_IMAGE:
        raise RecordError(
            f"{key}: an image of {len(data):,} bytes; at most {MAX_IMAGE:,} expected", reason="large_image"
        )
    return data


def read_image_file(path: str, key: str, folder: str) -> bytes:
    """A file by its path from `folder`, or in a bucket; a device, a pipe or a folder is none."""
    url = storage.join(folder, path)
    if storage.is_remote(url):
        return storage.read(url, key)
    try:
        kind = Path(url).stat()
        if not stat.S_ISREG(kind.st_mode):
            raise RecordError(f"{key}: {printable(url)} is no file", reason="missing_image")
        if kind.st_size > MAX_IMAGE:
            raise RecordError(f"{key}: an image of {kind.st_size:,} bytes; at most {MAX_IMAGE:,} expected",
                              reason="large_image")  # fmt: skip
        return Path(url).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        why = getattr(error, "strerror", None) or str(error)
        raise RecordError(f"{key}: {printable(url[:500])} can't be read ({why})", reason="missing_image") from None


SIGNATURES = {
    "jpg": rb"\xff\xd8\xff", "png": rb"\x89PNG\r\n\x1a\n", "webp": rb"RIFF....WEBP", "gif": rb"GIF8[79]a",
    "bmp": rb"BM", "tiff": rb"II\*\x00|MM\x00\*", "avif": rb"....ftyp(avif|avis|mif1)",
}  # fmt: skip


def suffix_of(image: bytes, key: str) -> str:
    """The format of an encoded image, by its first bytes. Raises RecordError where they are no image's."""
    for suffix, pattern in SIGNATURES.items():
        if re.match(pattern, image, re.DOTALL):
            return suffix
    raise RecordError(f"{key}: not an image of a known format", reason="not_an_image")
