"""Files of JSON records, one a line or all in one array: random access, `len(records)` and `records[i]`."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import DataError, RecordError

CHUNK = 1 << 24


class JsonRecords:
    """`records[i]` → (its key "FILE:LINE", the object).

    A file of lines is indexed once and read where it lies; one that is an array, as LLaVA's are, is read whole.

    Raises DataError where the file is missing, empty or a damaged array; `records[i]` RecordError, naming the line,
    for what is no JSON object.
    """

    def __init__(self, path: Path):
        self.path = path
        self._array: list[Any] | None = None
        try:
            with path.open("rb") as file:
                if file.read(CHUNK).lstrip()[:1] == b"[":
                    self._array = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not a JSON array ({error}); expected one, or an object a line") from None
        if self._array is None:
            self._file = path.open("rb")
            self._starts, self._stops, self._lines = line_spans(self._file)
        if len(self) == 0:
            raise DataError(f"{path}: empty; expected a JSON object a line, or an array of them")

    def __len__(self) -> int:
        return len(self._starts) if self._array is None else len(self._array)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any]]:
        if self._array is not None:
            key, found = f"{self.path}:[{index}]", self._array[index]
        else:
            start, stop, line = (int(part[index]) for part in (self._starts, self._stops, self._lines))
            key = f"{self.path}:{line}"
            try:
                found = json.loads(os.pread(self._file.fileno(), stop - start, start))
            except (ValueError, RecursionError) as error:
                raise RecordError(f"{key}: not JSON ({str(error)[:120]})", reason="not_json") from None
        if not isinstance(found, dict):
            raise RecordError(f"{key}: {type(found).__name__}; expected a JSON object", reason="not_a_json_object")
        return key, found


def line_spans(file: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the lines that are not empty begin and end, and their numbers from 1."""
    ends, size = [], 0
    while chunk := file.read(CHUNK):
        ends.append(size + np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
        size += len(chunk)
    stops = np.append(np.concatenate([*ends, np.zeros(0, np.int64)]), size)
    starts = np.append(0, stops[:-1] + 1)
    filled = np.flatnonzero(stops - starts > 1)
    return starts[filled], stops[filled], filled + 1
