"""Writes TFDS data sets: ArrayRecord files with their metadata, without TensorFlow, the same bytes in every build."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_tfds(
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    directory: Path,
    data_set: str,
    features: Mapping[str, Any],
    description: str,
    compression: str = "zstd",
) -> None:
    """Writes records in their order to `directory`, named by the version, over what is there.

    Args:
      splits: split → its records, feature → value.
      data_set: its name in the metadata and in the files' names.
      features: feature → its TFDS connector.
      compression: of the ArrayRecord files, as their writer's options spell it.
    """
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():  # so that it can be called again

        class Builder(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version(directory.name)
            name = data_set

            def _info(self) -> Any:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=description,
                    features=tfds.features.FeaturesDict(dict(features)),
                    disable_shuffling=True,
                )

            def _split_generators(self, _: Any) -> dict[str, Iterator[tuple[int, Mapping[str, Any]]]]:
                return {name: self._generate_examples(records) for name, records in splits.items()}

            def _generate_examples(
                self, records: Sequence[Mapping[str, Any]]
            ) -> Iterator[tuple[int, Mapping[str, Any]]]:
                yield from enumerate(records)

    shutil.rmtree(directory, ignore_errors=True)
    scratch = directory.parent / ".building"
    shutil.rmtree(scratch, ignore_errors=True)
    builder = Builder(data_dir=str(scratch), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(compute_stats="skip"))
    for path in Path(builder.data_path).glob("*.array_record-*"):
        _rewrite(path, compression)
    shutil.move(str(builder.data_path), directory)
    shutil.rmtree(scratch)


def _rewrite(path: Path, compression: str) -> None:
    """Rewrites an ArrayRecord file of examples with the features of each in the order of their names.

    TFDS leaves their order to protobuf, whose maps have another one in every process: the same records would
    be other bytes in each build.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    reader = ArrayRecordReader(str(path))
    records = reader.read_all()
    reader.close()
    path.unlink()
    writer = ArrayRecordWriter(str(path), f"group_size:1,{compression}")  # the one size that TFDS's readers accept
    for record in records:
        writer.write(tf_example_pb2.Example.FromString(record).SerializeToString(deterministic=True))
    writer.close()
