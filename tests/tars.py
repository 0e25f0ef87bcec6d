"""Tars and pictures that tests make."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

Member = tuple[str | tarfile.TarInfo, bytes]


@cache
def picture(seed: int, suffix: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(file, suffix)
    return file.getvalue()


def tar_bytes(members: Iterable[Member], form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def record(key: str, seed: int, text: str | None = None, **more: bytes) -> list[Member]:
    members: Mapping[str, bytes] = {"jpg": picture(seed), "txt": (text or f"picture {seed}").encode(), **more}
    return [(f"{key}.{suffix}", data) for suffix, data in members.items()]


def write_shards(folder: Path, shards: int, rows: int) -> str:
    """img2dataset's: jpg, txt and json, keys by number; → the pattern that names them."""
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        members = [
            member
            for row in range(rows)
            for member in record(
                f"{shard:05d}{row:04d}", shard * rows + row, json=json.dumps({"caption": f"in json {row}"}).encode()
            )
        ]
        (folder / f"{shard:05d}.tar").write_bytes(tar_bytes(members))
    return f"{folder}/{{00000..{shards - 1:05d}}}.tar"
