"""Many records in a file, and many files: JSON lines, packed or not, tars of JSON, and images by name in tars.

A shard, on a disk or in a bucket, is indexed once, into a small file beside it (`SHARD.lines.npy`; in the cache where
that can't be written), and read where a record lies. Packed lines (.gz, .zip) are unpacked a whole shard at a time.
"""

import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import re
import tarfile
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, Any, Generic, TypeVar

import numpy as np

from clip_jax.data.sources import IMAGE_SUFFIXES, storage
from clip_jax.errors import DataError, RecordError
from clip_jax.files import is_file
from flamingo_jax.data.json_records import line_spans
from flamingo_jax.data.media import Span
from flamingo_jax.data.video import VIDEO_SUFFIXES

V = TypeVar("V")
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zip")
MAX_UNPACKED = 1 << 31  # bytes of a shard; more is taken for a decompression bomb
MAX_RECORD = 1 << 28  # bytes of a record
THREADS = 16  # that index shards of a bucket
RECENT = 4  # shards or row groups kept in memory, of a source
SPAN = np.dtype([("name", "<u8"), ("start", "<i8"), ("size", "<i8")])


class Recent(Generic[V]):
    """The last RECENT results of a function, which threads call."""

    def __init__(self, make: Callable[[Any], V]):
        self._make, self._lock = make, threading.Lock()
        self._kept: OrderedDict[Hashable, V] = OrderedDict()

    def __call__(self, key: Hashable) -> V:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = self._make(key)  # by several threads at a time; of one key seldom
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > RECENT:
                self._kept.popitem(last=False)
        return made


def expand(where: str) -> list[str]:
    """Files by `docs_{0..99}.jsonl`, `{a,b}.tar` or `*.tar`, in order. Raises DataError where there is none."""
    if storage.is_remote(where):
        urls = storage.list_files(where, "")
        storage.stamps(urls)  # which tells those that are missing
        return urls
    parts = re.split(r"\{([^{}]+)\}", where)
    names = ["".join(some) for some in itertools.product(*(_choices(p) if i % 2 else [p] for i, p in enumerate(parts)))]
    found = [str(Path(path)) for name in names for path in _matches(name)]
    if missing := [path for path in found if not is_file(path)]:
        raise DataError(f"{missing[0]}: no such file ({len(missing)} of {len(found)} in {where})")
    if not found:
        raise DataError(f"{where}: no such files")
    return found


def _matches(name: str) -> list[str]:
    pattern = glob.has_magic(name) and not is_file(name)  # a[1].tar may be a file's name
    return sorted(glob.glob(name)) if pattern else [name]  # noqa: PTH207


def _choices(braces: str) -> list[str]:
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", braces):
        first, last = bounds.groups()
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return braces.split(",")


class JsonShards:
    """The records of shards: lines of `.jsonl`, `.jsonl.gz`, `.jsonl.zip`, or the .json files of `.tar`.

    `records[i]` → (its key "SHARD:LINE" or, in a tar, "SHARD:NUMBER", the object, the number of its shard). Raises
    RecordError, naming the record, for what is no JSON object; the class DataError for what can't be opened.
    """

    def __init__(self, where: str):
        self.paths = expand(where)
        for path in self.paths:
            if not path.endswith((*LINES, ".tar")):
                raise DataError(f"{path}: expected {', '.join(LINES)} or .tar")
        self._spans = tables(self.paths, lambda path: _json_members if path.endswith(".tar") else _lines)
        self._ends = np.cumsum([len(spans) for spans in self._spans])
        if not len(self):
            raise DataError(f"{where}: empty; expected a JSON object a line or, in a tar, a file")
        self._unpacked = Recent(unpacked)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> tuple[str, dict[str, Any], int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        spans, path = self._spans[shard], self.paths[shard]
        line, start, size = spans[index - int(self._ends[shard]) + len(spans)].tolist()
        key = f"{path}:{line}"
        if size > MAX_RECORD:
            raise RecordError(f"{key}: {size:,} bytes; at most {MAX_RECORD:,} expected", reason="record_too_large")
        if path.endswith((".gz", ".zip")):
            try:
                data = self._unpacked(path)[start : start + size]
            except Exception as error:  # it could be read when it was opened
                reason = storage.first_line(error)
                raise RecordError(f"{key}: can't be read ({reason})", reason="can_not_be_read") from None
        else:
            data = Span(str(line), path, start, size).read()
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"{key}: not JSON ({str(error)[:120]})", reason="not_json") from None
        if not isinstance(found, dict):
            raise RecordError(f"{key}: {type(found).__name__}; expected a JSON object", reason="not_a_json_object")
        return key, found, shard


class ImageStore:
    """Images and clips by name: in a folder, or in tars, where they may have the name of the address they are from.

    Names are the file's own, with its folders or without. img2dataset's tars, whose members are numbers, say in
    a .json beside each image which address (`url`) it is from. In a bucket, images lie in tars.

    Raises DataError for what can't be opened.
    """

    def __init__(self, where: str, tries: Sequence[str] = ("{name}",)):
        self._folder = Path(where) if Path(where).is_dir() else None
        self._tries = tries
        if self._folder is None:
            if storage.is_remote(where) and not where.endswith(".tar"):
                raise DataError(f"{where}: no tars; images in a bucket are expected in tars, as {{0..9}}.tar")
            self._paths = expand(where)
            found = tables(self._paths, lambda path: _image_members)
            files = np.repeat(np.arange(len(found), dtype=np.int32), [len(table) for table in found])
            table = np.concatenate(found)
            order = np.argsort(table["name"], kind="stable")
            self._table, self._files = table[order], files[order]

    def find(self, name: str, shard: int = 0, url: str = "") -> Path | Span | None:
        """Where an image of a name (`shard`: of its record), or else of an address, lies; None where it does not.

        Nothing outside the folder is found.
        """
        if self._folder is None:
            for wanted in filter(None, (name, url)):
                place = int(np.searchsorted(self._table["name"], named(wanted)))
                if place < len(self._table) and self._table["name"][place] == named(wanted):
                    _, start, size = self._table[place].tolist()
                    return Span(name or url, self._paths[self._files[place]], start, size)
            return None
        for pattern in self._tries:
            path = inside(self._folder, pattern.format(name=name, shard=shard)) if name else None
            if path is not None and is_file(path):
                return path
        return None


def inside(folder: Path, name: str) -> Path | None:
    """A path below a folder, links followed; None where a name leads out of it, or is none."""
    if "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return None
    path = folder / name
    try:
        return path if path.resolve().is_relative_to(folder.resolve()) else None
    except (OSError, RuntimeError):  # too long a name, links in a circle
        return None


def named(name: str) -> int:
    """64 bits of a name's hash, which stand for it in an index."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "little")


Reader = Callable[[str], np.ndarray]


def tables(paths: Sequence[str], reader: Callable[[str], Reader]) -> list[np.ndarray]:
    """The spans of shards, each by the reader for it. Raises DataError."""
    with ThreadPoolExecutor(THREADS if storage.is_remote(paths[0]) else 1) as pool:
        return list(pool.map(lambda path, stamp: indexed(path, stamp, reader(path)), paths, storage.stamps(paths)))


def indexed(path: str, stamp: str, read: Reader) -> np.ndarray:
    """A shard's spans: from the file beside it or in the cache, if it is of that version, or read now and kept."""
    beside = f"{path}.{read.__name__.strip('_')}.npy"
    version = np.array([(named(stamp), 0, 0)], SPAN)
    for where in (beside, str(storage.cached(beside))):
        with suppress(DataError, OSError, ValueError, EOFError):  # a damaged index is made again
            kept = np.load(io.BytesIO(storage.read_if_there(where) or b""))
            if kept.dtype == SPAN and len(kept) and kept[0] == version[0]:
                return kept[1:]
    try:
        found = read(path)
    except DataError:
        raise
    except Exception as error:  # of tarfile, zipfile, zlib and, of a bucket, of boto, aiohttp, google …
        reason = getattr(error, "strerror", None) or storage.first_line(error)
        raise DataError(f"{path}: can't be read ({reason})") from None
    file = io.BytesIO()
    np.save(file, np.concatenate([version, found]))
    with suppress(OSError):  # neither the disk nor the cache can be written
        storage.save(beside, file.getvalue())
    return found


def unpacked(path: str) -> bytes:
    """All of a .gz or .zip file, of whose members the first .jsonl counts. Raises DataError where it is too large."""
    if path.endswith(".gz"):
        with storage.open_file(path) as packed, gzip.open(packed) as file:
            data = file.read(MAX_UNPACKED + 1)
    else:
        with storage.open_file(path) as packed, zipfile.ZipFile(packed) as archive:
            lines = [member for member in archive.infolist() if member.filename.endswith(".jsonl")]
            if not lines:
                raise DataError(f"{path}: no .jsonl in it")
            with archive.open(lines[0]) as member:
                data = member.read(MAX_UNPACKED + 1)
    if len(data) > MAX_UNPACKED:
        raise DataError(f"{path}: more than {MAX_UNPACKED:,} bytes unpacked")
    return data


def _lines(path: str) -> np.ndarray:
    """Number, start and size of every line that is not blank."""
    with io.BytesIO(unpacked(path)) if path.endswith((".gz", ".zip")) else storage.open_file(path) as file:
        starts, stops, numbers = line_spans(file)
    found = np.zeros(len(starts), SPAN)
    found["name"], found["start"], found["size"] = numbers, starts, stops - starts
    return found


def members(path: str, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The files of an open tar, up to where it is damaged or cut off; no links, no devices. `file` may be read."""
    size = file.seek(0, 2)
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        try:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("cut off")
                if member.isreg() and not member.sparse:
                    yield member
        except tarfile.TarError as error:
            logging.warning("%s: damaged (%s); what stands before is used", path, error)


def _json_members(path: str) -> np.ndarray:
    with storage.open_file(path) as file:
        found = [(m.offset_data, m.size) for m in members(path, file) if m.name.endswith(".json")]
    return np.array([(number, *span) for number, span in enumerate(found)], SPAN)


def _image_members(path: str) -> np.ndarray:
    """Spans of media, by the hash of their name, with and without folders, and of the address they are from."""
    spans: list[tuple[int, int, int]] = []
    waiting: dict[str, dict[str, Any]] = {}  # stem → what is known of it
    with storage.open_file(path) as file:
        for member in members(path, file):
            name = PurePosixPath(member.name)
            known = waiting.setdefault(str(name.with_suffix("")), {})
            if name.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                known["span"] = member.offset_data, member.size
                spans += [(named(one), *known["span"]) for one in dict.fromkeys((member.name, name.name))]
            elif name.suffix == ".json" and member.size < 1 << 20:
                file.seek(member.offset_data)
                try:
                    known["url"] = json.loads(file.read(member.size))["url"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
            if isinstance(known.get("url"), str) and "span" in known:
                spans.append((named(known["url"]), *known["span"]))
                del waiting[str(name.with_suffix(""))]
            elif len(waiting) > 10_000:  # the two stand beside each other
                waiting.pop(next(iter(waiting)))
    return np.array(spans, SPAN)
