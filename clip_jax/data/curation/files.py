"""Files that are there whole or not at all, on a disk or, by fsspec, in a bucket; many workers may write at once."""

import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem


@contextmanager
def whole(path: str) -> Iterator[Path]:
    """A file of one's own to write to, which then takes its place; after an error nothing is left of it.

    Two workers that were given the same task both write the same bytes, each to a file of its own.
    """
    fs, where = fsspec.core.url_to_fs(path)
    fs.makedirs(fs._parent(where), exist_ok=True)
    local = isinstance(fs, LocalFileSystem)
    folder = Path(where).parent if local else Path(tempfile.gettempdir())
    temporary = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        if local:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(where)
        else:  # an object appears when its upload is complete
            fs.put_file(str(temporary), where)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str, text: str) -> None:
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_text(path: str) -> str:
    with fsspec.open(path, "r", encoding="utf-8") as file:
        return file.read()


def write_table(path: str, columns: Mapping[str, Any], schema: pa.Schema | None = None) -> None:
    with whole(path) as temporary:
        pq.write_table(pa.table(dict(columns), schema=schema), temporary, compression="zstd")


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    with fsspec.open(path, "rb") as file:
        return pq.read_table(file, columns=columns)


def exists(path: str) -> bool:
    fs, where = fsspec.core.url_to_fs(path)
    return fs.exists(where)


def names(folder: str) -> set[str]:
    """The names of the files in a folder; of none, where it is not there."""
    fs, where = fsspec.core.url_to_fs(folder)
    return {Path(name).name for name in fs.ls(where, detail=False)} if fs.isdir(where) else set()


def remove_leftovers(folder: str) -> None:
    """Removes what a killed run had begun to write."""
    fs, where = fsspec.core.url_to_fs(folder)
    if isinstance(fs, LocalFileSystem):
        for path in Path(where).rglob(".*.tmp"):
            path.unlink(missing_ok=True)
