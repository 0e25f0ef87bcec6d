"""webdataset itself, on the tars that we write and on hostile ones: the same records, in the same order."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from clip_jax.data.sources import open_source
from clip_jax.errors import RecordError
from launch import prepare


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


def samples(pattern: str) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset(pattern, shardshuffle=False))


@pytest.fixture
def written(tmp_path: Path) -> str:
    """Shards by webdataset's own writer."""
    with webdataset.ShardWriter(f"{tmp_path}/in-%05d.tar", maxcount=3, verbose=0) as writer:
        for i in range(7):
            about = json.dumps({"caption": f"json {i}"}).encode()
            writer.write({"__key__": f"dir.v1/{i:04d}", "jpg": picture(i), "txt": f"text {i}", "json": about})
    return f"{tmp_path}/in-{{00000..00002}}.tar"


def test_we_read_what_webdataset_writes(written: str) -> None:
    source, expected = open_source(f"tar:{written}"), samples(written)
    assert len(source) == len(expected) == 7
    for i, sample in enumerate(expected):
        key = f"{sample['__url__']}/{sample['__key__']}"
        assert (source[i].key, source[i].image, source[i].text) == (key, sample["jpg"], sample["txt"].decode())


def test_webdataset_reads_what_we_write(written: str, tmp_path: Path) -> None:
    prepare.main(["convert", f"tar:{written}", "--to", f"tar:{tmp_path}/out", "--shard-size", "4", "--workers", "1"])
    found = samples(f"{tmp_path}/out/{{00000..00001}}.tar")
    assert [sample["__key__"] for sample in found] == [f"{i:012d}" for i in range(7)]
    assert [(sample["jpg"], sample["txt"]) for sample in found] == [
        (picture(i), f"text {i}".encode()) for i in range(7)
    ]


def test_records_are_grouped_and_named_as_webdataset_does(tmp_path: Path) -> None:
    link, directory = tarfile.TarInfo("d.png"), tarfile.TarInfo("sub.dir")
    link.type, link.linkname, directory.type = tarfile.SYMTYPE, "/etc/passwd", tarfile.DIRTYPE
    members: list[tuple[str | tarfile.TarInfo, bytes]] = [
        ("./a.JPG", picture(0)), ("./a.txt", b"upper"), (directory, b""), ("sub.dir/b.x.jpg", picture(1)),
        ("sub.dir/b.txt", b"two dots"), ("c.txt", b"text first"), ("c.jpg", picture(2)), ("README", b"none"),
        ("__meta__/x.json", b"{}"), ("n" * 150 + ".jpg", picture(3)), ("n" * 150 + ".txt", b"long"),
        ("a.jpg", picture(4)), ("a.txt", b"again"), ("z.jpg", picture(5)), ("z.txt", b"last"),
    ]  # fmt: skip
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name) if isinstance(name, str) else name
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source, expected = open_source(f"tar:{path}"), samples(str(path))
    assert [f"{path}/{sample['__key__']}" for sample in expected] == [_key(source, i) for i in range(len(source))]
    assert [sample.get("jpg", sample.get("x.jpg")) for sample in expected] == [
        source[i].image for i in range(len(source))
    ]
    assert [sample["txt"].decode() for sample in expected] == [source[i].text for i in range(len(source))]


def _key(source: object, i: int) -> str:
    try:
        return source[i].key  # type: ignore[index]
    except RecordError as error:
        return str(error).partition(": ")[0]
