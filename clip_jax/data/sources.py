"""What can be read: random access to image–text records, `len(source)` and `source[i]`.

A source is named by `KIND:WHERE`; `open_source` opens it. To add a kind, write a class with `__len__` and
`__getitem__` and enter it in `SOURCES`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, SupportsIndex

from clip_jax.errors import DataError, RecordError

ASSETS = Path(__file__).parent / "assets"


def find_asset(path: str) -> Path:
    """A file by its path or, where there is none, of that name among the embedded assets."""
    return Path(path) if Path(path).exists() else ASSETS / path


@dataclass(frozen=True)
class Pair:
    """An image, still encoded, and its text."""

    key: str
    image: bytes
    text: str
    keywords: tuple[str, ...] = ()
    group: str = ""
    style: str = ""


class PairSource(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> Pair: ...


class TfdsRecords:
    """The records of a split of a TFDS data set on disk (ArrayRecord files), read without TensorFlow.

    `expected` names the features that are needed, each as one or as several of which the first there is counts;
    `found` are those names. Image features stay encoded.

    Raises DataError where the directory is missing, half-written, or has no such split or feature.
    """

    def __init__(self, directory: str | Path, split: str, expected: Sequence[Sequence[str]]):
        import tensorflow_datasets as tfds

        self.directory, self.split = Path(directory), split
        for name in ("dataset_info.json", "features.json"):
            if not (self.directory / name).is_file():
                raise DataError(
                    f"{self.directory / name}: not found; expected a TFDS data set (dataset_info.json, "
                    f"features.json, *.array_record*)"
                )
        try:
            builder = tfds.builder_from_directory(str(self.directory))
            features, splits = builder.info.features, builder.info.splits
        except Exception as error:  # TFDS and protobuf raise many kinds, bare Exceptions among them
            raise DataError(f"{self.directory}: not a readable TFDS data set: {_first_line(error)}") from None
        if split not in splits:
            raise DataError(f"{self.directory}: no split {split!r}; expected one of {', '.join(sorted(splits))}")
        self.found = [next((name for name in names if name in features), "") for names in expected]
        if not all(self.found):
            wanted = " and ".join(("one of " if len(names) > 1 else "") + ", ".join(names) for names in expected)
            raise DataError(f"{self.directory}: features {', '.join(sorted(features))}; expected {wanted}")
        for path, length in zip(splits[split].filepaths, splits[split].shard_lengths, strict=True):
            _check_shard(Path(path), length)
        try:
            # Images stay encoded: a decoder that meets a bad one should not end the run.
            images = (name for name, feature in features.items() if isinstance(feature, tfds.features.Image))
            self._records = builder.as_data_source(split, decoders=dict.fromkeys(images, tfds.decode.SkipDecoding()))
            if len(self._records):
                self._records[len(self._records) - 1]  # the last record is what a cut-off file lacks
        except Exception as error:  # the reader is C++ and raises bare RuntimeErrors among others
            raise DataError(
                f"{self.directory}: split {split!r} can't be read, a file is damaged or cut off: {_first_line(error)}"
            ) from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Mapping[str, Any]:
        """The record's features, texts as bytes. Raises RecordError where its checksum is wrong."""
        try:
            return self._records[index]
        except RuntimeError as error:
            raise RecordError(f"{self.directory}: {self.split}/{index}: {_first_line(error)}") from None


class TfdsSource:
    """Pairs from a split of a TFDS data set.

    `image` is an Image feature; the text is the first of the features `text`, `caption` and `label` that
    there is; `keywords`, `group`, `style` and `key` are taken where they exist. Raises as TfdsRecords does.
    """

    def __init__(self, directory: str | Path, split: str):
        self._records = TfdsRecords(directory, split, (("image",), ("text", "caption", "label")))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Pair:
        example = self._records[index]
        image, text = self._records.found
        return Pair(
            key=_string(example.get("key", f"{self._records.split}/{index}")),
            image=example[image],
            text=_string(example[text]),
            keywords=tuple(map(_string, example.get("keywords", ()))),
            group=_string(example.get("group", "")),
            style=_string(example.get("style", "")),
        )


def _open_tfds(where: str) -> PairSource:
    directory, _, split = where.rpartition("#")
    if not directory:
        raise DataError(f"tfds:{where}: expected tfds:DIRECTORY#SPLIT")
    return TfdsSource(directory, split)


def _open_emoji(split: str) -> PairSource:
    return TfdsSource(ASSETS / "emoji" / "1.0.0", split)


SOURCES: dict[str, Callable[[str], PairSource]] = {"tfds": _open_tfds, "emoji": _open_emoji}


def open_source(spec: str) -> PairSource:
    """Opens `emoji:SPLIT` (embedded) or `tfds:DIRECTORY#SPLIT`.

    Raises DataError for an unknown kind and for what the kind itself refuses.
    """
    kind, _, where = spec.partition(":")
    if kind not in SOURCES or not where:
        raise DataError(f"data source {spec!r}: expected KIND:WHERE with KIND one of {', '.join(SOURCES)}")
    source = SOURCES[kind](where)
    if len(source) == 0:
        raise DataError(f"data source {spec!r} is empty: expected at least one record")
    return source


def texts_of(source: PairSource) -> Sequence[str]:
    """The text of every record, in order."""
    return [source[i].text for i in range(len(source))]


def _check_shard(path: Path, length: int) -> None:
    """Raises DataError where a shard is missing, cut off, or holds another number of records."""
    from array_record.python.array_record_module import ArrayRecordReader

    if not path.is_file():
        raise DataError(f"{path}: not found; dataset_info.json lists it")
    try:
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except Exception as error:
        raise DataError(f"{path}: damaged or cut off: {_first_line(error)}") from None
    if found != length:
        raise DataError(f"{path}: holds {found} records; dataset_info.json says {length}")


def _string(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
