"""`convert`: any data set as tars, which everybody reads, or as ArrayRecord files, which are read fastest."""

import argparse
import os
from typing import Any

from clip_jax.errors import DataError
from launch.preparing import Outcome

KINDS = ("tar", "array_record")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("convert", help="writes a data set anew as shards of tar or ArrayRecord")
    parser.add_argument("spec", help="a data source, KIND:WHERE")
    parser.add_argument("--to", required=True, help="tar:DIR or array_record:DIR; a bucket (s3://, gs://) for tar")
    parser.add_argument("--shard-size", type=int, default=10_000, help="rows of the source in a shard (default: 10000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: the cores)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Outcome:
    from clip_jax.data.converting import convert
    from clip_jax.data.sources import storage

    kind, _, folder = arguments.to.partition(":")
    if kind not in KINDS or not folder or (kind == "array_record" and storage.is_remote(folder)):
        raise DataError(f"--to {arguments.to}: expected tar:DIR or array_record:DIR, the latter on a disk")
    if arguments.shard_size < 1:
        raise DataError(f"--shard-size {arguments.shard_size}: at least 1 expected")
    try:
        plan, counts = convert(arguments.spec, kind, folder, arguments.shard_size, arguments.workers)
    except OSError as error:  # a full disk, a folder of others
        raise DataError(f"--to {arguments.to}: {error.strerror or storage.first_line(error)}") from None
    text = (f"{arguments.to}: {counts.written:,} of {plan.rows:,} rows written, {counts.bytes / 1e9:,.3f} GB, "
            f"{plan.shards:,} shards")  # fmt: skip
    if counts.skipped:
        named = ", ".join(f"{count:,} {reason}" for reason, count in counts.skipped.most_common())
        text += f"\n{counts.skipped.total():,} left out: {named}"
    figures = {"rows": plan.rows, "written": counts.written, "bytes": counts.bytes, "shards": plan.shards}
    return Outcome(text, figures | {"left_out": dict(counts.skipped)})
