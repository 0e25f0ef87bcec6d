"""A data set written anew as shards of tar or ArrayRecord: each whole or not at all, with what was left out and why."""

import io
import json
import multiprocessing
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

from tqdm import tqdm

from clip_jax.data.sources import Pair, PairSource, open_source, storage
from clip_jax.data.sources.array_record import EXTRAS, to_record
from clip_jax.data.sources.records import read_captions, suffix_of
from clip_jax.errors import DataError, RecordError

PLAN = "convert.json"
SCRATCH = ".convert-"


@dataclass(frozen=True)
class Plan:
    """`rows` of a source in shards of `shard_size` rows of it; what can't be used is left out of its shard."""

    source: str
    kind: str
    folder: str
    shard_size: int
    rows: int

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_size)

    def shard(self, number: int) -> str:
        return storage.join(self.folder, f"{number:0{max(5, len(str(self.shards - 1)))}d}.{self.kind}")


@dataclass
class Counts:
    written: int = 0
    bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(self.written + other.written, self.bytes + other.bytes, self.skipped + other.skipped)


def convert(source: str, kind: str, folder: str, shard_size: int, workers: int) -> tuple[Plan, Counts]:
    """Writes every usable record of a source in its order; what a run before this one has finished stays.

    Raises DataError where the folder holds the outcome of another source, kind or shard size.
    """
    plan = Plan(source, kind, folder, shard_size, len(open_source(source)))
    about = {"source": source, "kind": kind, "shard_size": shard_size, "rows": plan.rows}
    path = storage.join(folder, PLAN)
    if (before := storage.read_if_there(path)) is None:
        storage.write(path, json.dumps(about).encode())
    elif (found := json.loads(before)) != about:
        raise DataError(f"{path}: written for {found}; expected {about}: name another folder")
    if not storage.is_remote(folder):
        for left in Path(folder).glob(f"{SCRATCH}*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
    total = Counts()
    with tqdm(total=plan.shards, desc="convert", unit=" shards", disable=None) as bar:
        for counts in _shards(plan, workers):
            total += counts
            bar.update()
    return plan, total


def _shards(plan: Plan, workers: int) -> Iterator[Counts]:
    if min(workers, plan.shards) < 2:
        yield from map(partial(convert_shard, plan), range(plan.shards))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(partial(convert_shard, plan), range(plan.shards))


def convert_shard(plan: Plan, number: int) -> Counts:
    """Writes one shard, its counts first: where it is there, they are, too."""
    url = plan.shard(number)
    noted = f"{url.removesuffix('.' + plan.kind)}_stats.json"
    if storage.exists(url) and (before := storage.read_if_there(noted)) is not None:
        found = json.loads(before)
        return Counts(found["written"], found["bytes"], Counter(found["skipped"]))
    source, counts = _source(plan.source), Counts()
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=None if storage.is_remote(url) else plan.folder) as scratch:
        file = Path(scratch) / "shard"
        with (_TarWriter if plan.kind == "tar" else _ArrayRecordWriter)(file) as writer:
            for row in range(number * plan.shard_size, min((number + 1) * plan.shard_size, plan.rows)):
                try:
                    writer.write(row, checked(source[row]))
                except RecordError as error:
                    counts.skipped[error.reason] += 1
                else:
                    counts.written += 1
        counts.bytes = file.stat().st_size
        stats = {"written": counts.written, "bytes": counts.bytes, "skipped": dict(counts.skipped)}
        storage.write(noted, json.dumps(stats).encode())
        storage.move(file, url)
    return counts


@lru_cache(maxsize=1)
def _source(spec: str) -> PairSource:
    return open_source(spec)


def checked(pair: Pair) -> Pair:
    """Raises RecordError for a text that is empty and for an image that does not begin as one."""
    read_captions(pair.text, pair.key)
    suffix_of(pair.image, pair.key)
    return pair


class _TarWriter:
    """`<row>.jpg`, `<row>.txt` and, where there is more, `<row>.json`: as webdataset, img2dataset and open_clip do."""

    def __init__(self, path: Path):
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed in __exit__)

    def write(self, row: int, pair: Pair) -> None:
        members = {suffix_of(pair.image, pair.key): pair.image, "txt": pair.text.encode()}
        if more := {name: value for name in EXTRAS if (value := getattr(pair, name))}:
            members["json"] = json.dumps({"key": pair.key, "caption": pair.text} | more).encode()
        for suffix, data in members.items():
            member = tarfile.TarInfo(f"{row:012d}.{suffix}")
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))

    def __enter__(self) -> "_TarWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()


class _ArrayRecordWriter:
    def __init__(self, path: Path):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")

    def write(self, row: int, pair: Pair) -> None:
        self._writer.write(to_record(pair))

    def __enter__(self) -> "_ArrayRecordWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
