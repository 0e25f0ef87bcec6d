"""What is written: WebDataset tars, each with a Parquet file of what is in it; the same bytes in every run."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from clip_jax.data.curation import files
from clip_jax.data.sources import Pair

SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}  # of other formats, the name


@dataclass(frozen=True)
class Slice:
    """Kept pairs first … last - 1 of a part, counted from 0."""

    part: int
    first: int
    last: int


def plan(sizes: Sequence[int], shard_size: int) -> list[list[Slice]]:
    """Shards of `shard_size` pairs, but for the last, out of the parts' kept pairs in their order."""
    shards: list[list[Slice]] = []
    room = 0
    for part, size in enumerate(sizes):
        first = 0
        while first < size:
            if not room:
                shards.append([])
                room = shard_size
            last = min(size, first + room)
            shards[-1].append(Slice(part, first, last))
            room -= last - first
            first = last
    return shards


def write(stem: str, first: int, pairs: Iterable[tuple[Pair, list[str]]]) -> None:
    """Writes `stem`.tar and then `stem`.parquet, which says that the shard is there.

    A member's name is the pair's number in the whole, from `first` on; its own key is in the .json.
    """
    rows = []
    with files.whole(f"{stem}.tar") as path, tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (pair, queries) in enumerate(pairs, first):
            with Image.open(io.BytesIO(pair.image)) as image:
                width, height, kind = *image.size, image.format or "bin"
            row = {"key": pair.key, "caption": pair.text, "width": width, "height": height, "queries": queries}
            given = {name: value for name, value in dataclasses.asdict(pair).items() if name != "image" and value}
            members = {
                SUFFIXES.get(kind, kind.lower()): pair.image,
                "json": json.dumps(given | row, ensure_ascii=False, sort_keys=True).encode("utf-8", "replace"),
                "txt": pair.text.encode("utf-8", "replace"),
            }
            for suffix, data in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            rows.append({"name": f"{number:09d}", **row})
    files.write_table(f"{stem}.parquet", {name: [row[name] for row in rows] for name in rows[0]})


def stem(folder: str | Path, shard: int, count: int) -> str:
    return f"{folder}/{shard:0{max(5, len(str(count - 1)))}d}"
