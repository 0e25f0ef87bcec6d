"""Data sets that TFDS has prepared, read without TensorFlow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from clip_jax.data.sources.records import Pair, PairSource
from clip_jax.data.sources.storage import first_line
from clip_jax.errors import DataError, RecordError


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
            raise DataError(f"{self.directory}: not a readable TFDS data set: {first_line(error)}") from None
        if split not in splits:
            raise DataError(f"{self.directory}: no split {split!r}; expected one of {', '.join(sorted(splits))}")
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise DataError(
                f"{self.directory}: written as {builder.info.file_format.value}; expected array_record, which can be "
                "read at random: prepare it with file_format=array_record"
            )
        self.found = [next((name for name in names if name in features), "") for names in expected]
        if not all(self.found):
            wanted = " and ".join(("one of " if len(names) > 1 else "") + ", ".join(names) for names in expected)
            raise DataError(f"{self.directory}: features {', '.join(sorted(features))}; expected {wanted}")
        self.features = features
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
                f"{self.directory}: split {split!r} can't be read, a file is damaged or cut off: {first_line(error)}"
            ) from None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Mapping[str, Any]:
        """The record's features, texts as bytes. Raises RecordError where its checksum is wrong."""
        try:
            return self._records[index]
        except RuntimeError as error:
            raise RecordError(
                f"{self.directory}: {self.split}/{index}: {first_line(error)}", reason="unreadable"
            ) from None


class TfdsSource:
    """Pairs from a split of a TFDS data set.

    `image` is an Image feature; the text is the first of the features `text`, `caption`, `captions` (several) and
    `label` that there is; `keywords`, `group`, `style` and `key` are taken where they exist. A ClassLabel is read
    as its name. Raises as TfdsRecords does.
    """

    def __init__(self, directory: str | Path, split: str):
        import tensorflow_datasets as tfds

        self._records = TfdsRecords(directory, split, (("image",), ("text", "caption", "captions", "label")))
        feature = self._records.features[self._records.found[1]]
        self.classes = list(feature.names) if isinstance(feature, tfds.features.ClassLabel) else None

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> Pair:
        example = self._records[index]
        image, text = (example[name] for name in self._records.found)
        if isinstance(text, Mapping):  # a sequence of features, such as COCO's captions with their ids
            text = text.get("text", ())
        captions = (str(self.classes[int(text)]),) if self.classes else tuple(map(_string, np.atleast_1d(text)))
        key = _string(example.get("key", f"{self._records.split}/{index}"))
        if not captions:
            raise RecordError(f"{key}: no text", reason="missing_caption")
        return Pair(
            key=key,
            image=image,
            text=captions[0],
            keywords=tuple(map(_string, example.get("keywords", ()))),
            group=_string(example.get("group", "")),
            style=_string(example.get("style", "")),
            captions=captions if len(captions) > 1 else (),
        )


def open_tfds(where: str, data_dir: str | Path | None = None) -> PairSource:
    directory, hash_sign, split = where.rpartition("#")
    if hash_sign and directory:
        return TfdsSource(directory, split)
    name, _, split = where.rpartition("/")
    if hash_sign or not name or not split:
        raise DataError(f"tfds:{where}: expected tfds:DIRECTORY#SPLIT or tfds:NAME/SPLIT")
    import tensorflow_datasets as tfds

    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir and str(data_dir))
    except Exception as error:  # TFDS raises many kinds
        raise DataError(f"tfds:{where}: {first_line(error)}") from None
    return TfdsSource(builder.data_path, split)


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
        raise DataError(f"{path}: damaged or cut off: {first_line(error)}") from None
    if found != length:
        raise DataError(f"{path}: holds {found} records; dataset_info.json says {length}")


def _string(value: Any) -> str:
    return value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)
