"""`index`: where the records of a data set's files lie, found once by all cores, so that opening it takes no time."""

import argparse
import logging
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from tqdm import tqdm

from clip_jax.data.sources import FORMATS, open_source, sharded, shards, storage
from clip_jax.errors import DataError
from launch.preparing import Outcome

Named = tuple[str, str]  # a file, its version


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("index", help="looks through a data set's files once; training then opens it at once")
    parser.add_argument(
        "spec", help=f"KIND:FILES with KIND one of {', '.join(FORMATS)}, such as tar:web/{{000..331}}.tar"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: the cores)")
    parser.add_argument("--leave-out-bad", action="store_true", help="files that can't be read count as empty")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Outcome:
    kind, _, where = arguments.spec.partition(":")
    if kind not in FORMATS or not where:
        raise DataError(f"{arguments.spec!r}: expected KIND:FILES with KIND one of {', '.join(FORMATS)}")
    files, form = sharded(kind, where)
    stamps = storage.stamps(files)
    look = partial(look_through, form=form, leave_out=arguments.leave_out_bad)
    rows, bad, faults, damaged = 0, 0, Counter[str](), 0
    with tqdm(total=len(files), desc="index", unit=" files", disable=None) as bar:
        for file, found in zip(
            files, _map(look, list(zip(files, stamps, strict=True)), arguments.workers), strict=True
        ):
            bar.update()
            if isinstance(found, str):
                bad += 1
                bar.write(f"bad: {found}", file=sys.stderr)
                continue
            rows += found.rows
            faults.update(found.faults)
            if found.damage:
                damaged += 1
                bar.write(f"damaged: {file}: {found.damage}", file=sys.stderr)
    if bad:
        raise DataError(f"{bad} of {len(files)} files can't be read (above); --leave-out-bad counts them as empty")
    logging.disable(logging.WARNING)  # what is damaged was said above
    try:
        open_source(arguments.spec)  # writes how many records each file has
    finally:
        logging.disable(logging.NOTSET)
    size = sum(map(storage.size_of, stamps))
    text = f"{arguments.spec}: {rows:,} rows, {size / 1e9:,.3f} GB, {len(files):,} files"
    if damaged:
        text += f", {damaged} of them damaged"
    if faults:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in faults.most_common())
        text += f"\n{faults.total():,} rows can't be used: {reasons}"
    figures = {"rows": rows, "bytes": size, "files": len(files), "damaged": damaged, "faults": dict(faults)}
    return Outcome(text, figures)


def look_through(named: Named, form: shards.Format, leave_out: bool) -> shards.Index | str:
    """What is in a file, without its arrays, or why it can't be read."""
    url, stamp = named
    index = shards.find(url, stamp, form)
    try:
        if index is None or (index.damage and index.rows == 0 and not leave_out):
            index = shards.build(url, stamp, form, leave_out)
    except DataError as error:
        return str(error)
    return shards.Index(url, stamp, index.rows, index.damage, index.names, index.faults)


def _map(look: Any, named: list[Named], workers: int) -> Iterator[shards.Index | str]:
    if min(workers, len(named)) < 2:
        yield from map(look, named)
        return
    with ProcessPoolExecutor(min(workers, len(named)), multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(look, named, chunksize=max(1, min(16, len(named) // (4 * workers))))
