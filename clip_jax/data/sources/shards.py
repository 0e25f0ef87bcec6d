"""Data sets in many files: which record lies in which, at any size.

What a file holds is found once and kept in a small file beside it, `<file>.index`, or in the cache where nothing may
be written: for each record where it lies. Those are opened when a record of theirs is asked for, some at a time. How
many records each file holds stands, for a data set of many files, in one more: `<digest of the names>.rows`. So opening
reads one file and compares sizes and times; what has changed is looked at again.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from clip_jax.data.sources import storage
from clip_jax.data.sources.records import Pair
from clip_jax.errors import DataError

MANY = 64  # files, from which on their numbers of records are kept together
OPEN_INDEXES = 1024  # of files in use, in each process
THREADS = 16


@dataclass(frozen=True)
class Contents:
    """What is in a file: the number of records, arrays by which they are found, and what is wrong with the file.

    `faults`: reason → how many records can't be used, as far as the format tells.
    """

    rows: int
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    names: Sequence[str] = ()
    damage: str = ""
    faults: Mapping[str, int] = field(default_factory=dict)


class Format(Protocol):
    """How the files of a kind are read. An instance can be pickled: it goes to other processes.

    `kind` changes when the arrays do. `indexed`: whether there are arrays; other formats find records by themselves.
    """

    kind: str
    indexed: bool

    def __hash__(self) -> int: ...

    def contents(self, url: str) -> Contents:
        """Looks through a whole file. Raises DataError, naming it, where nothing in it can be read."""
        ...

    def pair(self, index: "Index", row: int) -> Pair: ...

    def captions(self, index: "Index", row: int) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Index:
    """A file with its index; `arrays` are read from the disk by slice."""

    url: str
    stamp: str
    rows: int
    damage: str = ""
    names: tuple[str, ...] = ()
    faults: Mapping[str, int] = field(default_factory=dict)
    arrays: Mapping[str, Any] = field(default_factory=dict, repr=False)


def build(url: str, stamp: str, form: Format, leave_out: bool = False) -> Index:
    """Looks through a file and writes its index. `leave_out`: what can't be read becomes a file without records."""
    try:
        found = form.contents(url)
    except DataError as error:
        if not leave_out:
            raise
        found = Contents(0, damage=f"{str(error).removeprefix(f'{url}: ')} (left out)")
    about = {"kind": form.kind, "stamp": stamp, "rows": found.rows, "damage": found.damage,
             "names": list(found.names), "faults": dict(found.faults)}  # fmt: skip
    if form.indexed or found.damage:
        where = storage.save(f"{url}.index", save(dict(found.arrays), {"about": json.dumps(about)}))
        if (index := _read(where, url, stamp, form)) is not None:
            return index
    return Index(url, stamp, found.rows, found.damage, tuple(found.names), found.faults)


def find(url: str, stamp: str, form: Format) -> Index | None:
    """The index of a file as it is now, if there is one."""
    beside = f"{url}.index"
    if not storage.is_remote(url):
        return _read(beside, url, stamp, form) or _read(str(storage.cached(beside)), url, stamp, form)
    copy = storage.cached(beside)
    if (index := _read(str(copy), url, stamp, form)) is not None:
        return index
    fs, path = storage.filesystem(beside)
    try:
        data = fs.cat_file(path)
    except Exception:  # not there, or not ours to read: it is made anew
        return None
    storage.write(copy, data, sync=False)
    return _read(str(copy), url, stamp, form)


def _read(path: str, url: str, stamp: str, form: Format) -> Index | None:
    if storage.is_remote(path):  # just written there
        fs, name = storage.filesystem(path)
        storage.write(storage.cached(path), fs.cat_file(name), sync=False)
        path = str(storage.cached(path))
    if not Path(path).is_file():
        return None
    try:
        opened = safe_open(path, "numpy")
        about = json.loads(opened.metadata()["about"])
        if about["kind"] != form.kind or about["stamp"] != stamp:
            return None
        arrays = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        return Index(url, stamp, int(about["rows"]), about["damage"], tuple(about["names"]), about["faults"], arrays)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):  # damaged: it is made anew
        return None


@lru_cache(maxsize=OPEN_INDEXES)
def _opened(url: str, stamp: str, form: Format) -> Index:
    return find(url, stamp, form) or build(url, stamp, form)


class Shards:
    """The records of many files in the files' order; `rows[f]` and `damaged[f]` tell what file f holds.

    Nothing of a file but its name, version and number of records is held in memory. Threads, and processes that it is
    pickled to or that are forked, may read it at the same time.

    Raises DataError for files that are missing and for one in which nothing can be read.
    """

    def __init__(self, files: Sequence[str], form: Format):
        self.files, self.format = list(files), form
        self.stamps = storage.stamps(self.files)
        digests = np.array([_digest(stamp) for stamp in self.stamps], np.uint64)
        table = storage.join(storage.folder_of(self.files[0]), f"{_digest(form.kind, *self.files):016x}.rows")
        self.rows, self.damaged, known = _read_table(table, digests)
        unknown = np.flatnonzero(~known)
        if len(unknown):
            self._look(unknown)
        if len(self.files) >= MANY and len(unknown):
            columns = {"stamps": digests, "rows": self.rows, "damaged": self.damaged}
            storage.save(table, save(columns))
        for f in np.flatnonzero(self.damaged):
            logging.warning("%s: %s", self.files[f], self.index(int(f)).damage)
        self._ends = np.cumsum(self.rows)
        self.classes: Sequence[str] | None = getattr(form, "classes", None)

    def _look(self, files: np.ndarray) -> None:
        """Takes the numbers of files from their own indexes; those that have none are looked through."""

        def look(some: np.ndarray) -> int:
            for f in some:
                name = self.files[f], self.stamps[f]
                index = find(*name, self.format) or build(*name, self.format)
                self.rows[f], self.damaged[f] = index.rows, bool(index.damage)  # the index itself is let go
            return len(some)

        parts = np.array_split(files, -(-len(files) // max(1, min(64, len(files) // THREADS))))
        with (
            ThreadPoolExecutor(min(THREADS, len(parts))) as pool,
            tqdm(total=len(files), desc="opening", unit=" files", delay=2, disable=None) as bar,
        ):
            for count in pool.map(look, parts):
                bar.update(count)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def index(self, file: int) -> Index:
        return _opened(self.files[file], self.stamps[file], self.format)

    def locate(self, index: SupportsIndex) -> tuple[int, int]:
        """(the file, the record's row in it). Raises IndexError."""
        number = index.__index__()
        number += len(self) if number < 0 else 0
        if not 0 <= number < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file = int(np.searchsorted(self._ends, number, side="right"))
        return file, number - int(self._ends[file] - self.rows[file])

    def __getitem__(self, index: SupportsIndex) -> Pair:
        file, row = self.locate(index)
        return self.format.pair(self.index(file), row)

    def captions(self, index: SupportsIndex) -> tuple[str, ...]:
        """The captions of a record; its image is not read."""
        file, row = self.locate(index)
        return self.format.captions(self.index(file), row)


def _digest(*texts: str) -> int:
    joined = "\n".join(texts).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def _read_table(url: str, stamps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(rows, whether a file is damaged, whether that is known) for files of such versions, as far as it was kept."""
    nothing = np.zeros(len(stamps), np.int64), np.zeros(len(stamps), np.bool_), np.zeros(len(stamps), np.bool_)
    if len(stamps) < MANY:
        return nothing
    path = storage.cached(url)
    if storage.is_remote(url):
        fs, name = storage.filesystem(url)
        try:
            storage.write(path, fs.cat_file(name), sync=False)
        except Exception:  # not there: what the cache holds may do
            logging.debug("%s: not read", url)
    elif Path(url).is_file():
        path = Path(url)
    try:
        with safe_open(path, "numpy") as table:
            kept = table.get_tensor("stamps"), table.get_tensor("rows"), table.get_tensor("damaged")
    except (SafetensorError, OSError):
        return nothing
    if any(column.shape != stamps.shape for column in kept):
        return nothing
    known = kept[0] == stamps
    return np.where(known, kept[1], 0), np.where(known, kept[2], False), known
