"""Features of a frozen tower, computed once (`python -m launch.prepare features`) and read instead of pixels.

A directory of `features.array_record`, whose record i is a safetensors file with an array [F, N, C] for each image or
clip of page i, named 0, 1, … (an empty record where one does not decode), and `manifest.json`: `tower`, the digest of
the tower's parameters and statistics, the preprocessing and what else the features depend on, the data set, its size.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import deserialize
from safetensors.numpy import save

from clip_jax.errors import ConfigError, DataError, RecordError
from clip_jax.training.optimizer import path_string

RECORDS, MANIFEST = "features.array_record", "manifest.json"


def tower_digest(variables: Any) -> str:
    """sha256 of a tower's parameters and statistics: their paths, dtypes, shapes and bytes."""
    h = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        array = np.asarray(leaf)
        h.update(f"{path_string(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return h.hexdigest()


class Features:
    """`features[i]`: the features [F, N, C] of each image of page i.

    Raises DataError where the directory holds no finished ones; `features[i]` RecordError where page i has none.
    """

    def __init__(self, directory: Path):
        from array_record.python.array_record_module import ArrayRecordReader

        self.directory = directory
        try:
            self.manifest = json.loads((directory / MANIFEST).read_text())
            self._reader = ArrayRecordReader(str(directory / RECORDS))
            count, found = self.manifest["records"], self._reader.num_records()
            self.item = tuple(self.manifest["item"])
            self.dtype = np.dtype(self.manifest["dtype"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise DataError(
                f"{directory}: no finished features there ({str(error).splitlines()[0][:200]}); "
                "write some with `python -m launch.prepare features`"
            ) from None
        if count != found:
            raise DataError(f"{directory / RECORDS}: {found} records; {MANIFEST} says {count}")

    def __len__(self) -> int:
        return self.manifest["records"]

    def __getitem__(self, index: int) -> list[np.ndarray]:
        record = self._reader.read([index])[0]
        if not record:
            raise RecordError(f"{self.directory}: no features of record {index}, which did not decode")
        arrays = dict(deserialize(record))  # the library's own function for numpy reads no bfloat16
        found = (arrays[str(i)] for i in range(len(arrays)))
        return [np.frombuffer(array["data"], self.dtype).reshape(array["shape"]) for array in found]

    def check(self, what: str, expected: Mapping[str, Any]) -> None:
        """Raises ConfigError, naming `what` and the first difference, for features that are not the expected ones."""
        for key, value in expected.items():
            if self.manifest.get(key) != value:
                raise ConfigError(
                    f"{what}: {key} is {_short(self.manifest.get(key))} in {self.directory}; this run has "
                    f"{_short(value)}: prepare the features again"
                )


def write_features(
    directory: Path, pages: Iterable[Sequence[np.ndarray] | None], manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the features of page 0, 1, … (None where an image does not decode), and returns the manifest.

    The directory appears when all is written, or not at all. Raises DataError where it exists, or no image decodes.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    if directory.exists():
        raise DataError(f"{directory}: exists already; remove it or name another directory")
    unfinished = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # what a killed run left
    unfinished.mkdir(parents=True)
    records, missing, images, first = 0, 0, 0, None
    try:
        writer = ArrayRecordWriter(str(unfinished / RECORDS), "group_size:1")
        try:
            for arrays in pages:
                records += 1
                if arrays is None:
                    missing += 1
                    writer.write(b"")
                    continue
                images, first = images + len(arrays), arrays[0] if first is None and arrays else first
                writer.write(save({str(i): np.ascontiguousarray(array) for i, array in enumerate(arrays)}))
        finally:
            writer.close()
        if first is None:
            raise DataError(f"{directory}: none of {records} records has an image that decodes")
        counts = {"records": records, "missing": missing, "images": images}
        manifest = {**manifest, **counts, "item": list(first.shape[1:]), "dtype": first.dtype.name}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return dict(manifest)


def _short(value: Any) -> str:
    return repr(value)[:60]
