"""Shards in a bucket: an S3-compatible server on loopback gives the same records as a disk, or an error with a name."""

import base64
import gzip
import json
import logging
import multiprocessing
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec.config
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from tars import tar_bytes, write_shards

from clip_jax.data.sources import open_source, storage
from clip_jax.errors import DataError, RecordError
from flamingo_jax.data.media import Page, Raw
from flamingo_jax.data.pages import open_pages
from launch import prepare


@pytest.fixture(scope="module")
def connection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3fs.S3FileSystem]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("FSSPEC_S3_ENDPOINT_URL", "http://{}:{}".format(*running.get_host_and_port()))
        patch.setattr(fsspec.config, "conf", {})
        fsspec.config.set_conf_env(fsspec.config.conf)  # as it is done at the start of a process
        s3fs.S3FileSystem.clear_instance_cache()
        yield storage.filesystem("s3://bucket")[0]
        s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


@pytest.fixture
def bucket(
    connection: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[s3fs.S3FileSystem]:
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    connection.mkdir("bucket")
    yield connection
    connection.rm("bucket", recursive=True)


def test_the_same_records_as_from_a_disk(bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    local = open_source(f"tar:{write_shards(tmp_path / 'web', 2, 3)}")
    for path in (tmp_path / "web").glob("*.tar"):
        bucket.put_file(str(path), f"bucket/web/{path.name}")
    for spec in ("s3://bucket/web/{00000..00001}.tar", "s3://bucket/web/*.tar", "s3://bucket/web/"):
        source = open_source(f"tar:{spec}")
        assert len(source) == 6
        for i in range(6):
            assert (source[i].image, source[i].captions, source[i].text) == (local[i].image, (), local[i].text)
    assert source[0].key == "s3://bucket/web/00000.tar/000000000"
    assert bucket.exists("bucket/web/00000.tar.index")
    with pytest.raises(DataError, match=r"s3://bucket/web/00002.tar: not found, nor are 1 others of 4"):
        open_source("tar:s3://bucket/web/{00000..00003}.tar")


def test_another_process_reads_it_after_a_fork(bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    write_shards(tmp_path / "web", 1, 2)
    bucket.put_file(str(tmp_path / "web/00000.tar"), "bucket/a.tar")
    source = open_source("tar:s3://bucket/a.tar")
    expected = source[1].image
    forked = multiprocessing.get_context("fork")
    pipe, end = forked.Pipe()
    process = forked.Process(target=lambda: end.send(source[1].image))
    process.start()
    assert pipe.poll(60) and pipe.recv() == expected
    process.join()


def test_parquet_json_lines_and_their_images_in_a_bucket(bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet
    from tars import picture

    parquet.write_table(pa.table({"image": [picture(1)], "text": ["one"]}), tmp_path / "x.parquet")
    bucket.put_file(str(tmp_path / "x.parquet"), "bucket/x.parquet")
    bucket.pipe_file("bucket/images/2.jpg", picture(2))
    bucket.pipe_file("bucket/t.jsonl", b'{"image": "images/2.jpg", "text": "two"}\n{"image": "3.jpg", "text": "three"}')
    assert open_source("parquet:s3://bucket/x.parquet")[0].image == picture(1)
    table = open_source("jsonl:s3://bucket/t.jsonl")
    assert (table[0].image, table[0].text) == (picture(2), "two")
    with pytest.raises(RecordError, match=r"t.jsonl#1: s3://bucket/3.jpg can't be read"):
        table[1]


def contents(page: Page) -> Sequence[object]:
    return [part.read("") if isinstance(part, Raw) else part for part in page.parts]


def test_interleaved_pages_are_those_of_a_disk(bucket: s3fs.S3FileSystem, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet
    from tars import picture

    def lines(*records: Any) -> bytes:
        return b"".join(json.dumps(record).encode() + b"\n" for record in records)

    def page(*numbers: int, within: bool = False) -> dict[str, Any]:
        image = lambda i: {"image_base64": base64.b64encode(picture(i)).decode()} if within else {}  # noqa: E731
        return {
            "text_list": [f"Sentence {j}." for j in range(3)],
            "image_info": [
                {"image_name": f"{i}.jpg", "raw_url": f"http://example.org/{i}", "matched_text_index": 2 - place,
                 "matched_sim": 0.5} | image(i)
                for place, i in enumerate(numbers)
            ],
        }  # fmt: skip

    folder = tmp_path / "data"
    folder.mkdir()
    for shard in range(2):
        records = lines(page(2 * shard, 2 * shard + 1), page(shard))
        (folder / f"docs_{shard}.jsonl").write_bytes(records)
        (folder / f"docs_{shard}.jsonl.gz").write_bytes(gzip.compress(records))
    (folder / "images.tar").write_bytes(tar_bytes([(f"{i}.jpg", picture(i)) for i in range(4)]))
    addresses = [(f"{i:09}.json", json.dumps({"url": f"http://example.org/{i}"}).encode()) for i in range(4)]
    fetched = [member for i in range(4) for member in ((f"{i:09}.jpg", picture(i)), addresses[i])]
    (folder / "fetched.tar").write_bytes(tar_bytes(fetched))
    within = [(f"{i}.json", json.dumps(page(i, 3 - i, within=True)).encode()) for i in range(2)]
    (folder / "within.tar").write_bytes(tar_bytes(within))
    (folder / "own.jsonl").write_bytes(lines({"text": "a <image> b", "images": ["3.jpg"]}))
    columns = {"images": [[None, picture(1)], [picture(2), None]], "texts": [["one", None], [None, "two"]]}
    parquet.write_table(pa.table(columns), folder / "pages.parquet", row_group_size=1)
    named = {"images": [[None, "http://example.org/1"]], "texts": [["one", None]]}
    parquet.write_table(pa.table(named), folder / "named.parquet")
    for path in sorted(folder.iterdir()):
        bucket.put_file(str(path), f"bucket/data/{path.name}")
    for kind, files, images, count in (
        ("mmc4", "docs_{0..1}.jsonl", "#{}/images.tar", 4),
        ("mmc4", "docs_*.jsonl.gz", "#{}/fetched.tar", 4),
        ("mmc4", "within.tar", "", 2),
        ("obelics", "pages.parquet", "", 2),
        ("obelics", "named.parquet", "#{}/fetched.tar", 1),
        ("json", "own.jsonl", "#{}/images.tar", 1),
    ):
        local, far, again = (
            open_pages("interleaved", f"{kind}:{where}/{files}{images.format(where)}")
            for where in (folder, "s3://bucket/data", "s3://bucket/data")  # again: by the index in the bucket
        )
        assert len(local) == len(far) == len(again) == count, files
        for i in range(count):
            assert contents(far[i]) == contents(again[i]) == contents(local[i]), files
            assert local[i].media and far[i].key == local[i].key.replace(str(folder), "s3://bucket/data")
    assert bucket.exists("bucket/data/docs_0.jsonl.lines.npy") and bucket.exists(
        "bucket/data/fetched.tar.image_members.npy"
    )


def test_pages_that_a_bucket_does_not_hold_are_named(bucket: s3fs.S3FileSystem) -> None:
    bucket.pipe_file("bucket/bad.tar", b"no tar" * 1000)
    bucket.pipe_file("bucket/bad.parquet", b"no parquet" * 1000)
    bucket.pipe_file("bucket/a.jsonl", b'{"text": "a <image>", "images": ["../b.jpg"]}\n')
    bucket.pipe_file("bucket/images.tar", tar_bytes([("b.jpg", b"x")]))
    for spec, message in (
        ("mmc4:s3://bucket/bad.tar", "s3://bucket/bad.tar: can't be read"),
        ("mmc4:s3://bucket/{0..1}.tar", "s3://bucket/0.tar: not found, nor are 1 others of 2"),
        ("obelics:s3://bucket/bad.parquet", "s3://bucket/bad.parquet: can't be read"),
        ("mmc4:s3://bucket/a.jsonl#s3://bucket/images", "s3://bucket/images: no tars; images in a bucket"),
        ("json:s3://bucket/a.jsonl", "s3://bucket/a.jsonl: no tars; images in a bucket"),
    ):
        with pytest.raises(DataError, match=message):
            open_pages("interleaved", spec)
    pages = open_pages("interleaved", "json:s3://bucket/a.jsonl#s3://bucket/images.tar")
    with pytest.raises(RecordError, match=r"s3://bucket/a.jsonl:1: \.\./b.jpg is not in s3://bucket/images.tar"):
        pages[0]
    bucket.pipe_file("bucket/a.jsonl.gz", gzip.compress(b"{}\n"))
    packed = open_pages("interleaved", "json:s3://bucket/a.jsonl.gz#s3://bucket/images.tar")
    bucket.rm(["bucket/a.jsonl", "bucket/a.jsonl.gz"])
    for gone in (pages, packed):
        with pytest.raises(RecordError, match=r"s3://bucket/a.jsonl.*1: can't be read"):
            gone[0]


def test_index_and_convert_write_to_a_bucket(
    bucket: s3fs.S3FileSystem, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = f"tar:{write_shards(tmp_path / 'web', 1, 3)}"
    prepare.main(["convert", spec, "--to", "tar:s3://bucket/out", "--shard-size", "2", "--workers", "1"])
    prepare.main(["index", "tar:s3://bucket/out", "--workers", "1"])
    assert "3 of 3 rows written" in (printed := capsys.readouterr().out) and "3 rows" in printed
    source, before = open_source("tar:s3://bucket/out"), open_source(spec)
    assert [source[i].image for i in range(3)] == [before[i].image for i in range(3)]


def test_a_cut_connection_is_a_record_error_after_retries(
    bucket: s3fs.S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path / "web", 1, 2)
    bucket.put_file(str(tmp_path / "web/00000.tar"), "bucket/cut.tar")
    source = open_source("tar:s3://bucket/cut.tar")
    assert source[0].text == "picture 0"
    with socket.create_server(("127.0.0.1", 0)) as other:  # hears and closes, mid-sentence
        attempts = _hang_up(other)
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
        cut = s3fs.S3FileSystem(
            endpoint_url=f"http://127.0.0.1:{other.getsockname()[1]}", config_kwargs={"retries": {"max_attempts": 0}}
        )
        monkeypatch.setattr(storage, "filesystem", lambda url: (cut, url.partition("://")[2]))
        with pytest.raises(RecordError, match=r"^s3://bucket/cut.tar/000000001: can't be read: ") as caught:
            source[1]
    assert caught.value.reason == "unreadable" and "\n" not in str(caught.value) and len(attempts) >= 2


def _hang_up(server: socket.socket) -> list[int]:
    """Answers every request with half of a response, in a thread; → a list that grows by one for each."""
    import threading

    attempts: list[int] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            attempts.append(1)
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 206 Partial Content\r\nContent-Length: 100000\r\n\r\nhalf")
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return attempts


def test_an_unknown_scheme_is_one_line() -> None:
    with pytest.raises(DataError, match=r"http://host: expected a path, or s3://, gs://"):
        open_source("tar:http://host/x.tar")


def test_a_broken_tar_in_a_bucket_is_named(bucket: s3fs.S3FileSystem) -> None:
    bucket.pipe_file("bucket/bad.tar", b"no tar" * 1000)
    bucket.pipe_file("bucket/empty.tar", tar_bytes([]))
    with pytest.raises(DataError, match=r"s3://bucket/bad.tar: not a readable tar"):
        open_source("tar:s3://bucket/bad.tar")
    with pytest.raises(DataError, match="is empty: expected at least one record"):
        open_source("tar:s3://bucket/empty.tar")
