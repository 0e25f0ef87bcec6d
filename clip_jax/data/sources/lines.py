"""Tables of text: CSV, TSV and JSON lines with the paths of images and their captions.

The index holds where each row begins: a table is not held in memory.
"""

import csv
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_jax.data.sources import storage
from clip_jax.data.sources.records import (
    IMAGE_COLUMNS,
    TEXT_COLUMNS,
    Pair,
    choose,
    json_object,
    make_pair,
    printable,
    read_captions,
    read_image,
)
from clip_jax.data.sources.shards import Contents, Index
from clip_jax.errors import DataError, RecordError

CHUNK = 1 << 24
MAX_ROW = 1 << 26  # bytes


def row_starts(url: str, quoted: bool) -> tuple[np.ndarray, int]:
    """(where each line that is not blank begins, the file's size). `quoted`: a line break in double quotes is none.

    Raises DataError for a file that is compressed.
    """
    starts: list[np.ndarray] = []
    begin, position, quotes, blank = 0, 0, 0, True
    with storage.open_file(url) as file:
        while chunk := file.read(CHUNK):
            if position == 0 and re.match(rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|PK\x03\x04", chunk):
                raise DataError(
                    f"{url}: compressed; expected a file that can be read at any place: decompress it first"
                )
            data = np.frombuffer(chunk, np.uint8)
            ends = np.flatnonzero(data == 0x0A)
            if quoted:
                marks = np.flatnonzero(data == 0x22)
                ends = ends[(np.searchsorted(marks, ends) + quotes) % 2 == 0]
                quotes += len(marks)
            solid = np.flatnonzero((data != 0x0A) & (data != 0x0D) & (data != 0x20) & (data != 0x09))
            # Of the lines that begin in this chunk, or before it and go on here, those with anything but blanks.
            begins = np.concatenate([[begin], position + ends + 1]).astype(np.int64)
            edges = np.searchsorted(solid, np.concatenate([[0], ends, [len(data)]]))
            full = np.diff(edges) > 0
            full[0] |= not blank
            starts.append(begins[:-1][full[:-1]])
            begin, blank, position = int(begins[-1]), not full[-1], position + len(data)
    if not blank:
        starts.append(np.array([begin], np.int64))
    return np.concatenate([*starts, np.zeros(0, np.int64)]), position


@dataclass(frozen=True)
class TextTable:
    """Rows of a table: `separator` for CSV, "" for JSON lines.

    `image`, `text`: the columns, by default the first known names. `folder`: where paths start, by default at the
    table's own folder. `classes`: the names that a number in the text stands for.
    """

    separator: str
    image: str = ""
    text: str = ""
    folder: str = ""
    classes: tuple[str, ...] | None = None
    indexed = True

    @property
    def kind(self) -> str:
        return f"rows-1 {self.separator!r}"

    def contents(self, url: str) -> Contents:
        starts, size = row_starts(url, quoted=bool(self.separator))
        if len(starts) == 0:
            raise DataError(f"{url}: empty; expected " + ("a line of column names" if self.separator else "JSON lines"))
        columns: list[str] = []
        if self.separator:
            header = storage.read_ranges(url, [(int(starts[0]), int([*starts, size][1] - starts[0]))], url)[0]
            columns = self._fields(header.removeprefix(b"\xef\xbb\xbf"), url)
            if twice := [name for name, count in Counter(columns).items() if count > 1]:
                raise DataError(
                    f"{url}: two columns {printable(twice[0])!r}; expected different names in its first line"
                )
            starts = starts[1:]
        return Contents(len(starts), {"starts": np.append(starts, size).astype(np.int64)}, tuple(columns))

    def _fields(self, line: bytes, key: str) -> list[str]:
        try:
            rows = list(csv.reader([line.decode("utf-8").rstrip("\r\n")], delimiter=self.separator))
        except UnicodeDecodeError as error:
            raise RecordError(f"{key}: not UTF-8 (byte {error.start} of the row)", reason="not_utf8") from None
        except csv.Error as error:
            raise RecordError(f"{key}: {error}", reason="bad_csv") from None
        return rows[0] if rows else []

    def row(self, index: Index, row: int) -> tuple[str, dict[str, Any]]:
        """(the record's name, column → value). Raises RecordError where the row can't be read."""
        start, stop = index.arrays["starts"][row : row + 2].tolist()
        key = f"{index.url}#{row}"
        if stop - start > MAX_ROW:
            raise RecordError(f"{key}: {stop - start:,} bytes; at most {MAX_ROW:,} expected", reason="long_caption")
        line = storage.read_ranges(index.url, [(start, stop - start)], key, index.stamp)[0]
        if self.separator:
            fields = self._fields(line, key)
            if len(fields) != len(index.names):
                raise RecordError(f"{key}: {len(fields)} fields; expected {len(index.names)}", reason="ragged_row")
            return key, dict(zip(index.names, fields, strict=True))
        return key, json_object(line, key)

    def _value(self, record: dict[str, Any], asked: str, known: Sequence[str], what: str, key: str) -> Any:
        """In a CSV a column that is not there ends the run; a JSON line may lack what others have."""
        try:
            return record[choose(list(record), asked, known, what, key)]
        except DataError as error:
            if self.separator:
                raise
            raise RecordError(str(error), reason=f"missing_{what}") from None

    def pair(self, index: Index, row: int) -> Pair:
        key, record = self.row(index, row)
        captions = self._captions(key, record)
        image = self._value(record, self.image, IMAGE_COLUMNS, "image", key)
        if isinstance(image, str):
            image = image.strip()
        return make_pair(key, read_image(image, key, self.folder or storage.folder_of(index.url)), captions)

    def captions(self, index: Index, row: int) -> tuple[str, ...]:
        return self._captions(*self.row(index, row))

    def _captions(self, key: str, record: dict[str, Any]) -> tuple[str, ...]:
        return read_captions(self._value(record, self.text, TEXT_COLUMNS, "caption", key), key, self.classes)
