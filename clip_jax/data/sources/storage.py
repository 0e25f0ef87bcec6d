"""Files on a disk and in a bucket alike: what a pattern names, their versions, parts of them, files of our own.

A bucket (`s3://`, `gs://`) needs the extra `remote`. Requests are repeated by the libraries that make them.
"""

import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from clip_jax.errors import DataError, RecordError
from clip_jax.files import is_file, is_folder

SCHEMES = ("s3", "gs", "gcs")
MAX_FILES = 10_000_000
GAP = 1 << 16  # bytes between two parts of a remote file below which one request reads both

Range = tuple[int, int]  # offset, size


def is_remote(url: str) -> bool:
    return "://" in url


def join(folder: str, path: str) -> str:
    return path if is_remote(path) or path.startswith("/") or not folder else f"{folder.rstrip('/')}/{path}"


def folder_of(url: str) -> str:
    folder = url.rpartition("/")[0]
    return folder or ("/" if url.startswith("/") else "")


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec's file system, the path in it). Raises DataError for one that is not known or not installed."""
    import fsspec

    if url.partition("://")[0] not in SCHEMES:
        raise DataError(f"{url}: expected a path, or {', '.join(f'{scheme}://' for scheme in SCHEMES)}")
    try:
        return fsspec.core.url_to_fs(url)  # of its own cache, which is another one in a forked process
    except ImportError as error:
        raise DataError(f"{url}: {error}; it needs the extra `remote`") from None


def expand(pattern: str) -> list[str]:
    """The names that a shell makes of `a-{000..331}.tar` and `{x,y}`; braces in braces are none."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    choices = match[1].split(",")
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = int(numbers[1]), int(numbers[2])
        if not first <= last < first + MAX_FILES:
            raise DataError(f"{pattern}: {{{match[1]}}} names no files; expected {{FIRST..LAST}}")
        choices = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]
    elif len(choices) < 2:
        raise DataError(f"{pattern}: {{{match[1]}}}; expected {{FIRST..LAST}} or {{a,b}}")
    rests = expand(pattern[match.end() :])
    return [pattern[: match.start()] + choice + rest for choice in choices for rest in rests]


def list_files(pattern: str, suffix: str) -> list[str]:
    """The files that a pattern names, with braces (in their order), `*` and `?`, or a folder's with a suffix, sorted.

    Raises DataError where it names none.
    """
    found: list[str] = []
    for name in expand(pattern):
        if name.endswith("/") or (not name.endswith(suffix) and _is_folder(name)):
            found += sorted(_glob(f"{name.rstrip('/')}/*{suffix}"))
        else:
            # A file on a disk may be named a[1].tar.
            several = any(c in name for c in "*?[") and (is_remote(name) or not is_file(name))
            found += sorted(_glob(name)) if several else [name]
    if not found:
        raise DataError(f"{pattern}: no such files (of a folder, *{suffix})")
    return found


def _is_folder(name: str) -> bool:
    if not is_remote(name):
        return is_folder(name)
    fs, path = filesystem(name)
    with _named(name):
        return fs.isdir(path)


def _glob(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return glob.glob(pattern)  # noqa: PTH207 (absolute patterns, too)
    fs, path = filesystem(pattern)
    with _named(pattern):
        return [fs.unstrip_protocol(name) for name in fs.glob(path)]


@contextmanager
def _named(url: str) -> Iterator[None]:
    try:
        yield
    except (DataError, RecordError):
        raise
    except Exception as error:  # of boto, aiohttp, google …
        raise DataError(f"{url}: can't be read: {first_line(error)}") from None


def stamps(urls: Sequence[str]) -> list[str]:
    """A text for every file that is another one when the file is: its size and time or, in a bucket, its digest.

    Raises DataError, naming the first and how many there are, for files that are missing.
    """
    found: dict[str, str] = {}
    for folder in dict.fromkeys(folder_of(url) for url in urls if is_remote(url)):
        fs, path = filesystem(folder)
        with _named(folder), suppress(FileNotFoundError):
            for info in fs.ls(path, detail=True, refresh=True):
                version = next((str(info[k]) for k in ("ETag", "etag", "md5Hash", "mtime", "updated") if k in info), "")
                found[str(info["name"])] = f"{info['size']} {version}"
    for url in urls:
        if is_remote(url):
            found[url] = found.get(url.partition("://")[2], "")
        else:
            with suppress(OSError, ValueError):
                status = Path(url).stat()
                found[url] = f"{status.st_size} {status.st_mtime_ns}"
    if missing := [url for url in urls if not found.get(url)]:
        more = f", nor are {len(missing) - 1:,} others of {len(urls):,}" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}: not found{more}")
    return [found[url] for url in urls]


def size_of(stamp: str) -> int:
    return int(stamp.partition(" ")[0])


def open_file(url: str) -> IO[bytes]:
    """For reading from front to back. Raises DataError."""
    if not is_remote(url):
        try:
            return Path(url).open("rb")
        except OSError as error:
            raise DataError(f"{url}: can't be read ({error.strerror})") from None
    fs, path = filesystem(url)
    with _named(url):
        return fs.open(path, "rb", block_size=1 << 23, cache_type="readahead")


class _Descriptor:
    """A file open for reading at offsets, by any thread; closed when nobody holds it any more."""

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self.number)


@lru_cache(maxsize=256)
def _descriptor(path: str, stamp: str) -> _Descriptor:
    return _Descriptor(path)


def read_ranges(url: str, ranges: Sequence[Range], key: str, stamp: str = "") -> list[bytes]:
    """Parts of a file. `stamp`: its version, by which an open file is told from one that took its place.

    Raises RecordError, which names `key`, where the file can't be read or ends before.
    """
    try:
        if not is_remote(url):
            descriptor = _descriptor(url, stamp)
            parts = [os.pread(descriptor.number, size, offset) for offset, size in ranges]
        else:
            parts = _request(url, ranges)
    except DataError:
        raise
    except Exception as error:  # of boto, aiohttp, google …
        raise RecordError(f"{key}: can't be read: {first_line(error)}", reason="unreadable") from None
    for part, (_, size) in zip(parts, ranges, strict=True):
        if len(part) != size:
            raise RecordError(f"{key}: cut off", reason="truncated")
    return parts


def _request(url: str, ranges: Sequence[Range]) -> list[bytes]:
    fs, path = filesystem(url)
    start, stop = min(offset for offset, _ in ranges), max(offset + size for offset, size in ranges)
    if stop - start <= sum(size for _, size in ranges) + GAP:
        whole = fs.cat_file(path, start=start, end=stop) if stop > start else b""
        return [whole[offset - start : offset - start + size] for offset, size in ranges]
    return fs.cat_ranges([path] * len(ranges), [o for o, _ in ranges], [o + s for o, s in ranges], on_error="raise")


def read(url: str, key: str = "") -> bytes:
    """A whole remote file. Raises RecordError, which names `key`."""
    fs, path = filesystem(url)
    try:
        return fs.cat_file(path)
    except Exception as error:
        raise RecordError(f"{key or url}: {url} can't be read: {first_line(error)}", reason="unreadable") from None


def cache_folder() -> Path:
    """Where what can't lie beside the data is kept: $CLIP_JAX_CACHE, or clip-jax in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("CLIP_JAX_CACHE") or Path(base).expanduser() / "clip-jax")


def cached(url: str) -> Path:
    return cache_folder() / "index" / hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()[:40]


def exists(url: str) -> bool:
    if not is_remote(url):
        return Path(url).is_file()
    fs, path = filesystem(url)
    with _named(url):
        return fs.exists(path)


def read_if_there(url: str) -> bytes | None:
    """A whole small file. Raises DataError where it is there but can't be read."""
    try:
        if not is_remote(url):
            return Path(url).read_bytes()
        fs, path = filesystem(url)
        with _named(url):
            return fs.cat_file(path) if fs.exists(path) else None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{url}: can't be read ({error.strerror})") from None


def write(url: str | Path, data: bytes, sync: bool = True) -> None:
    """Writes a file, whole or not at all; with `sync` after a power cut, too. Raises OSError, a bucket other errors."""
    if is_remote(str(url)):
        fs, name = filesystem(str(url))
        fs.pipe_file(name, data)
        return
    path = Path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Other processes may write the same file at the same time: each has a temporary name of its own.
    number, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move(file: Path, url: str) -> None:
    """Moves a finished file to its place, in one step. On a disk it must be in the same file system."""
    if is_remote(url):
        fs, path = filesystem(url)
        fs.put_file(str(file), path)
        return
    with file.open("rb") as written:
        os.fsync(written.fileno())
    file.replace(url)


def save(url: str, data: bytes) -> str:
    """Writes a file that can be made again: beside the data or, where that is not allowed, in the cache. → its path."""
    try:
        write(url, data, sync=False)
        return url
    except Exception:  # a disk that is full or for reading only; buckets that others own refuse in many ways
        write(cached(url), data, sync=False)
        return str(cached(url))


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
