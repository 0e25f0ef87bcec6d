"""Parquet files, with encoded images or with paths to them. Needs the extra `parquet`.

A row group is read as a whole, and some stay in memory: for training in random order, files of large row groups are
better converted (`launch.prepare convert`).
"""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from clip_jax.data.sources import storage
from clip_jax.data.sources.records import (
    IMAGE_COLUMNS,
    TEXT_COLUMNS,
    Pair,
    choose,
    make_pair,
    read_captions,
    read_image,
)
from clip_jax.data.sources.shards import Contents, Index
from clip_jax.errors import DataError, RecordError

MAX_GROUP = 1 << 31  # bytes of a row group's columns, uncompressed
GROUPS_KEPT = 4


@dataclass(frozen=True)
class ParquetFormat:
    """`image`, `text`: the columns, by default the first known names. `folder`: where paths start, by default at the
    file's own folder. `classes`: the names that a number in the text stands for, by default those in the file."""

    image: str = ""
    text: str = ""
    folder: str = ""
    classes: tuple[str, ...] | None = None
    kind = "parquet-1"
    indexed = False

    def contents(self, url: str) -> Contents:
        table = _open(url, "", os.getpid())
        columns = table.schema_arrow.names
        used = [choose(columns, self.image, IMAGE_COLUMNS, "image", url),
                choose(columns, self.text, TEXT_COLUMNS, "caption", url)]  # fmt: skip
        for number in range(table.num_row_groups):
            group = table.metadata.row_group(number)
            size = sum(part.total_uncompressed_size for part in map(group.column, range(group.num_columns))
                       if part.path_in_schema.split(".")[0] in used)  # fmt: skip
            if size > MAX_GROUP:
                raise DataError(f"{url}: row group {number} has {size:,} bytes; at most {MAX_GROUP:,} expected")
        return Contents(table.metadata.num_rows)

    def _columns(self, index: Index, row: int, *columns: str) -> tuple[str, list[Any]]:
        key = f"{index.url}#{row}"
        try:
            table, starts = _open(index.url, index.stamp, os.getpid()), _starts(index.url, index.stamp)
            group = int(np.searchsorted(starts, row, side="right")) - 1
            rows = _group(index.url, index.stamp, group, columns, os.getpid())
            values = [rows.column(name)[row - int(starts[group])].as_py() for name in columns]
        except DataError as error:  # the file was there when the source was opened
            raise RecordError(f"{key}: {error}", reason="unreadable") from None
        except Exception as error:  # Arrow raises many kinds, text that is no UTF-8 among them
            reason = "not_utf8" if isinstance(error, UnicodeError) else "unreadable"
            raise RecordError(f"{key}: can't be read: {storage.first_line(error)}", reason=reason) from None
        del table
        return key, values

    def pair(self, index: Index, row: int) -> Pair:
        names = _open(index.url, index.stamp, os.getpid()).schema_arrow.names
        image = choose(names, self.image, IMAGE_COLUMNS, "image", index.url)
        text = choose(names, self.text, TEXT_COLUMNS, "caption", index.url)
        key, (pixels, words) = self._columns(index, row, image, text)
        captions = read_captions(words, key, self.classes or class_names(index, text))
        return make_pair(key, read_image(pixels, key, self.folder or storage.folder_of(index.url)), captions)

    def captions(self, index: Index, row: int) -> tuple[str, ...]:
        names = _open(index.url, index.stamp, os.getpid()).schema_arrow.names
        text = choose(names, self.text, TEXT_COLUMNS, "caption", index.url)
        key, (words,) = self._columns(index, row, text)
        return read_captions(words, key, self.classes or class_names(index, text))


def class_names(index: Index, column: str) -> tuple[str, ...] | None:
    """The names of a column's classes, where Hugging Face's `datasets` has noted them."""
    try:
        noted = json.loads(_open(index.url, index.stamp, os.getpid()).schema_arrow.metadata[b"huggingface"])
        return tuple(noted["info"]["features"][column]["names"])
    except (KeyError, TypeError, ValueError):
        return None


@lru_cache(maxsize=64)
def _open(url: str, stamp: str, process: int) -> Any:
    """A file of that version, opened by that process. Raises DataError where it is damaged or no Parquet."""
    try:
        from pyarrow import parquet
    except ImportError:
        raise DataError(f"{url}: Parquet needs the extra `parquet`") from None
    file = storage.open_file(url) if storage.is_remote(url) else url
    try:
        return parquet.ParquetFile(file)
    except Exception as error:
        raise DataError(f"{url}: not a readable Parquet file: {storage.first_line(error)}") from None


@lru_cache(maxsize=64)
def _starts(url: str, stamp: str) -> np.ndarray:
    table = _open(url, stamp, os.getpid())
    counts = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
    return np.cumsum([0, *counts[:-1]])


@lru_cache(maxsize=GROUPS_KEPT)
def _group(url: str, stamp: str, group: int, columns: tuple[str, ...], process: int) -> Any:
    return _open(url, stamp, process).read_row_group(group, columns=list(columns), use_threads=False)
