"""ArrayRecord files of pairs, on a disk: what `launch.prepare convert --to array_record:DIR` writes.

A record is the length of a JSON text (4 bytes, little-endian), that text, UTF-8, with `key`, `text` and, where there
are any, `captions`, `keywords`, `group` and `style`; the rest is the image as it was encoded. A file of one record a
group and no compression (`group_size:1,uncompressed`) is read fastest.
"""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from clip_jax.data.sources import storage
from clip_jax.data.sources.records import Pair, checked_image, read_captions
from clip_jax.data.sources.shards import Contents, Index
from clip_jax.errors import DataError, RecordError

LENGTH = 4
EXTRAS: dict[str, Any] = {"keywords": (), "group": "", "style": "", "captions": ()}


def to_record(pair: Pair) -> bytes:
    about = {"key": pair.key, "text": pair.text}
    about |= {name: value for name in EXTRAS if (value := getattr(pair, name))}
    text = json.dumps(about, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return len(text).to_bytes(LENGTH, "little") + text + pair.image


def from_record(record: bytes, key: str) -> Pair:
    """Raises RecordError, naming `key`, for a record of another form."""
    stop = LENGTH + int.from_bytes(record[:LENGTH], "little")
    try:
        about = json.loads(record[LENGTH:stop].decode("utf-8"))
        image, name, text = record[stop:], about["key"], about["text"]
        extras = {field: type(empty)(about.get(field, empty)) for field, empty in EXTRAS.items()}
        strings = [name, *extras["keywords"], *extras["captions"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RecordError(f"{key}: not a pair ({storage.first_line(error)})", reason="wrong_type") from None
    if stop > len(record) or not all(isinstance(one, str) for one in strings):
        raise RecordError(f"{key}: not a pair", reason="wrong_type")
    return Pair(name, checked_image(image, key), read_captions(text, key)[0], **extras)


@dataclass(frozen=True)
class ArrayRecordFormat:
    kind = "array_record-1"
    indexed = False

    def contents(self, url: str) -> Contents:
        if storage.is_remote(url):
            raise DataError(f"{url}: ArrayRecord files are read from a disk only; convert them to tar")
        return Contents(_reader(url, "", os.getpid()).num_records())

    def pair(self, index: Index, row: int) -> Pair:
        key = f"{index.url}#{row}"
        try:
            record = _reader(index.url, index.stamp, os.getpid()).read([row])[0]
        except (RuntimeError, ValueError, IndexError, DataError) as error:
            raise RecordError(f"{key}: {storage.first_line(error)}", reason="unreadable") from None
        return from_record(record, key)

    def captions(self, index: Index, row: int) -> tuple[str, ...]:
        pair = self.pair(index, row)
        return pair.captions or (pair.text,)


@lru_cache(maxsize=256)
def _reader(path: str, stamp: str, process: int) -> Any:
    """A file of that version, opened by that process: the reader's threads do not survive a fork."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not Path(path).is_file():
        raise DataError(f"{path}: not found")
    try:
        reader = ArrayRecordReader(path, options="readahead_buffer_size:0")
        if not reader.ok():  # cut off, or of another kind: it would pass for an empty one
            raise RuntimeError("damaged or cut off")
    except Exception as error:  # the reader is C++ and raises bare RuntimeErrors among others
        raise DataError(f"{path}: not a readable ArrayRecord file: {storage.first_line(error)}") from None
    return reader
