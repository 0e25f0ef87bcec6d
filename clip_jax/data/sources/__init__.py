"""What can be read: random access to image–text records, `len(source)` and `source[i]`.

A source is named by `KIND:WHERE`; `open_source` opens it. To add a kind, write a class with `__len__` and
`__getitem__` and enter it in `SOURCES`; for one whose records lie in many large files, a `Format` (see `shards`) does.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from clip_jax.data.sources import storage
from clip_jax.data.sources.array_record import ArrayRecordFormat
from clip_jax.data.sources.folder import Folder
from clip_jax.data.sources.lines import TextTable
from clip_jax.data.sources.parquet import ParquetFormat
from clip_jax.data.sources.records import ASSETS, IMAGE_SUFFIXES, Pair, PairSource
from clip_jax.data.sources.shards import Format, Shards
from clip_jax.data.sources.tar import TarFormat
from clip_jax.data.sources.tfds import TfdsRecords, TfdsSource, open_tfds
from clip_jax.errors import DataError, RecordError
from clip_jax.files import read_lines

__all__ = ["ASSETS", "FORMATS", "IMAGE_SUFFIXES", "SOURCES", "Folder", "Pair", "PairSource", "TfdsRecords",
           "TfdsSource", "captions_at", "find_asset", "open_source", "sharded", "texts_of"]  # fmt: skip

# The formats of files, with their options' defaults, and what such files are called in a folder.
FORMATS: dict[str, tuple[Any, str]] = {
    "tar": (TarFormat(), ".tar"),
    "parquet": (ParquetFormat(), ".parquet"),
    "csv": (TextTable(","), ".csv"),
    "tsv": (TextTable("\t"), ".tsv"),
    "jsonl": (TextTable(""), ".jsonl"),
    "array_record": (ArrayRecordFormat(), ".array_record"),
}


def find_asset(path: str) -> Path:
    """A file by its path or, where there is none, of that name among the embedded assets."""
    return Path(path) if Path(path).exists() else ASSETS / path


def sharded(kind: str, where: str) -> tuple[list[str], Format]:
    """(the files, how they are read) of FILES or FILES#OPTION=VALUE&…, the options being the format's fields.

    Raises DataError for files that a pattern names but aren't there, and for an unknown option.
    """
    default, suffix = FORMATS[kind]
    pattern, mark, words = where.rpartition("#")
    if not mark or "=" not in words:
        pattern, words = where, ""
    options: dict[str, Any] = dict(parse_qsl(words, keep_blank_values=True))
    known = [one.name for one in fields(default)]
    if wrong := [name for name in options if name not in known]:
        raise DataError(f"{kind}:{where}: no option {wrong[0]!r}; expected {', '.join(known) or 'none'}")
    if "classes" in options:
        options["classes"] = tuple(read_lines(find_asset(options["classes"])))
    if len(options.get("separator", ",")) != 1:
        raise DataError(f"{kind}:{where}: separator {options['separator']!r}; expected one character")
    return storage.list_files(pattern, suffix), replace(default, **options)


def _open_files(kind: str, where: str) -> PairSource:
    return Shards(*sharded(kind, where))


def _open_emoji(split: str) -> PairSource:
    return TfdsSource(ASSETS / "emoji" / "1.0.0", split)


SOURCES: dict[str, Callable[[str], PairSource]] = {
    "tfds": open_tfds,
    "folder": Folder,
    "emoji": _open_emoji,
    **{kind: partial(_open_files, kind) for kind in FORMATS},
}


def open_source(spec: str, data_dir: str | Path | None = None) -> PairSource:
    """Opens a data set by its name.

    Args:
      spec: `emoji:SPLIT` (embedded), `folder:DIRECTORY` (see `Folder`), `tfds:DIRECTORY#SPLIT`, `tfds:NAME/SPLIT` for
        a data set that was prepared before, or one of FORMATS with its files: `tar:web/{00000..00331}.tar`,
        `parquet:DIRECTORY#image=picture&text=alt`. Files are named by path or in a bucket (s3://, gs://), with braces,
        `*`, `?`, or by their folder.
      data_dir: where TFDS keeps its data sets; by default $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises DataError for an unknown kind and for what the kind itself refuses.
    """
    kind, _, where = spec.partition(":")
    if kind not in SOURCES or not where:
        raise DataError(f"data source {spec!r}: expected KIND:WHERE with KIND one of {', '.join(SOURCES)}")
    source = open_tfds(where, data_dir) if kind == "tfds" else SOURCES[kind](where)
    if len(source) == 0:
        raise DataError(f"data source {spec!r} is empty: expected at least one record")
    return source


def texts_of(source: PairSource) -> Sequence[str]:
    """The text of every record, in order; of one that can't be used, nothing."""
    return [_text_at(source, i) for i in range(len(source))]


def _text_at(source: PairSource, index: int) -> str:
    try:
        return captions_at(source, index)[0]
    except RecordError:  # training replaces it when it is drawn, and counts it then
        return ""


def captions_at(source: PairSource, index: int) -> tuple[str, ...]:
    """All captions of a record, its image not read where the source can do without. Raises RecordError."""
    if (captions := getattr(source, "captions", None)) is not None:
        return captions(index)
    pair = source[index]
    return pair.captions or (pair.text,)
