"""Tars of pairs: what tarfile extracts is what is read where it lies, and nothing hostile does more than be refused."""

import gzip
import io
import json
import logging
import multiprocessing
import pickle
import resource
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from tars import picture, record, tar_bytes, write_shards

from clip_jax.data.sources import Pair, open_source, shards, storage, texts_of
from clip_jax.data.sources.shards import Shards, _digest
from clip_jax.data.sources.storage import expand
from clip_jax.data.sources.tar import TarFormat
from clip_jax.errors import DataError, RecordError

SHARDS, ROWS = 3, 4


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def web(tmp_path: Path) -> str:
    return write_shards(tmp_path / "web", SHARDS, ROWS)


def extracted(folder: Path) -> list[tuple[str, bytes, str]]:
    """(key, image, text) of all records, as tarfile reads them from front to back."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isreg()}  # type: ignore[union-attr]
        keys = dict.fromkeys(name.partition(".")[0] for name in files)
        found += [(f"{path}/{key}", files[f"{key}.jpg"], files[f"{key}.txt"].decode()) for key in keys]
    return found


def all_pairs(source: Any) -> list[tuple[str, bytes, str]]:
    return [(pair.key, pair.image, pair.text) for pair in (source[i] for i in range(len(source)))]


def outcome(data: bytes, tmp_path: Path, options: str = "") -> list[Pair | str]:
    """What each record of a tar is: a pair, or the reason why it is none."""
    (tmp_path / "one.tar").write_bytes(data)
    source = open_source(f"tar:{tmp_path}/one.tar{options}")
    found: list[Pair | str] = []
    for i in range(len(source)):
        try:
            found.append(source[i])
        except RecordError as error:
            assert "\n" not in str(error) and f"{tmp_path}/one.tar" in str(error)
            found.append(error.reason)
    files = {path.name for path in tmp_path.iterdir()} - {"cache"}
    assert files == {"one.tar", "one.tar.index"}, "something was extracted"
    return found


def reasons(data: bytes, tmp_path: Path, options: str = "") -> list[str]:
    return [one if isinstance(one, str) else one.text for one in outcome(data, tmp_path, options)]


def test_records_are_what_tarfile_extracts_in_order(web: str, tmp_path: Path) -> None:
    source = open_source(f"tar:{web}")
    assert len(source) == SHARDS * ROWS
    assert all_pairs(source) == extracted(tmp_path / "web")
    assert source[-1] == source[SHARDS * ROWS - 1] and texts_of(source)[5] == "picture 5"
    with pytest.raises(IndexError):
        source[SHARDS * ROWS]
    for spec in (str(tmp_path / "web"), f"{tmp_path}/web/*.tar", f"{tmp_path}/web/0000{{0,1,2}}.tar"):
        assert all_pairs(open_source(f"tar:{spec}")) == all_pairs(source)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_form_of_tar(form: int, tmp_path: Path) -> None:
    long = "d" * 90 if form == tarfile.USTAR_FORMAT else "deep/" * 40 + "n" * 120
    keys = ["a.b/c", long, "dir/x"] + (["ключ"] if form != tarfile.USTAR_FORMAT else [])
    directory = tarfile.TarInfo("dir")
    directory.type = tarfile.DIRTYPE
    members = [(directory, b"")] + [m for i, key in enumerate(keys) for m in record(key, i)]
    found = outcome(tar_bytes(members, form), tmp_path)
    assert [pair.key for pair in found] == [f"{tmp_path}/one.tar/{key}" for key in keys]  # type: ignore[union-attr]
    assert [pair.image for pair in found] == [picture(i) for i in range(len(keys))]  # type: ignore[union-attr]


def test_the_text_is_txt_or_json_or_what_was_asked_for(tmp_path: Path) -> None:
    more = {"json": json.dumps({"caption": "in json", "many": ["one", "two"], "n": 3}).encode(), "en.txt": b"english",
            "cls": b"1\n"}  # fmt: skip
    tar = tar_bytes(record("a", 0, "in txt", **more))
    assert reasons(tar, tmp_path) == ["in txt"]
    assert reasons(tar, tmp_path, "#text=json:caption") == ["in json"]
    assert reasons(tar, tmp_path, "#text=en.txt") == ["english"]
    (pair,) = outcome(tar, tmp_path, "#text=json:many")
    assert isinstance(pair, Pair) and pair.captions == ("one", "two") and pair.text == "one"
    assert reasons(tar, tmp_path, "#text=json:n") == ["wrong_type"]
    assert reasons(tar, tmp_path, "#text=json:none") == reasons(tar, tmp_path, "#text=html") == ["missing_caption"]
    assert reasons(tar, tmp_path, "#image=png") == ["missing_image"]
    names = tmp_path.parent / "names.txt"
    names.write_text("cat\ndog\n")
    assert reasons(tar, tmp_path, f"#text=cls&classes={names}") == ["dog"]
    assert open_source(f"tar:{tmp_path}/one.tar#text=cls&classes={names}").classes == ("cat", "dog")  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="no option 'txt'; expected image, text, classes"):
        open_source(f"tar:{tmp_path}/one.tar#txt=a")


def test_the_index_is_written_once_and_made_anew_when_the_tar_or_the_index_changes(web: str, tmp_path: Path) -> None:
    open_source(f"tar:{web}")
    indexes = sorted((tmp_path / "web").glob("*.index"))
    assert len(indexes) == SHARDS
    before = [path.stat().st_mtime_ns for path in indexes]
    whole = all_pairs(open_source(f"tar:{web}"))
    assert [path.stat().st_mtime_ns for path in indexes] == before
    (tmp_path / "web/00001.tar").write_bytes(tar_bytes(record("new", 77)))
    damaged = indexes[2].read_bytes()[:50]
    indexes[2].unlink()
    indexes[2].write_bytes(damaged)
    again = all_pairs(open_source(f"tar:{web}"))
    assert again == [*whole[:ROWS], (f"{tmp_path}/web/00001.tar/new", picture(77), "picture 77"), *whole[2 * ROWS :]]
    assert [path.stat().st_mtime_ns == b for path, b in zip(indexes, before, strict=True)] == [True, False, False]


def test_where_nothing_may_be_written_the_index_lies_in_the_cache(
    web: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = storage.write

    def refuse(url: str | Path, data: bytes, sync: bool = True) -> None:
        if Path(url).parent == tmp_path / "web":
            raise PermissionError(13, "Permission denied")
        write(url, data, sync)

    monkeypatch.setattr(storage, "write", refuse)
    assert all_pairs(open_source(f"tar:{web}")) == extracted(tmp_path / "web")
    assert not list((tmp_path / "web").glob("*.index")) and len(list((cache / "index").iterdir())) == SHARDS


def _read(source: Any) -> list[tuple[str, bytes, str]]:
    return all_pairs(source)


def test_threads_forked_and_spawned_processes_read_the_same(web: str) -> None:
    source = open_source(f"tar:{web}")
    expected = all_pairs(source)
    assert all_pairs(pickle.loads(pickle.dumps(source))) == expected
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(_read, [source] * 16))
    forked = multiprocessing.get_context("fork")
    pipe, end = forked.Pipe()
    process = forked.Process(target=lambda: end.send(_read(source)))
    process.start()
    assert pipe.recv() == expected
    process.join()
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        assert processes.apply(_read, (source,)) == expected


def test_braces_expand_as_in_a_shell() -> None:
    assert expand("a/{08..11}.tar") == [f"a/{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand("{0..1}-{x,y}") == ["0-x", "0-y", "1-x", "1-y"] and expand("plain") == ["plain"]
    for bad in ("{3..1}", "{0..99999999999}", "{x}"):
        with pytest.raises(DataError, match="expected"):
            expand(bad)


def test_missing_shards_are_named_and_counted(web: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"00003.tar: not found, nor are 6 others of 10"):
        open_source(f"tar:{tmp_path}/web/{{00000..00009}}.tar")
    with pytest.raises(DataError, match="no such files"):
        open_source(f"tar:{tmp_path}/nowhere/*.tar")


def test_a_billion_rows_open_in_seconds_and_little_memory(tmp_path: Path) -> None:
    """200 tars of five million records: the indexes, of which a few rows are written, are files with holes."""
    files, rows = 200, 5_000_000
    tar = tar_bytes(record("k", 1))
    for shard in range(files):
        path = tmp_path / f"{shard:05d}.tar"
        path.write_bytes(tar)
        (stamp,) = storage.stamps([str(path)])
        about = {"kind": "tar-1", "stamp": stamp, "rows": rows, "damage": "", "names": ["", "jpg", "txt"], "faults": {}}
        write_sparse_index(Path(f"{path}.index"), about, rows, (0, 999, rows - 1), tar)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    source = open_source(f"tar:{tmp_path}/{{00000..{files - 1:05d}}}.tar")
    first = time.process_time() - start
    assert len(source) == 1_000_000_000
    assert f"{tmp_path}/" not in Path("/proc/self/maps").read_text()  # a system allows 65,530
    for index in (0, 999, 112 * rows + 999, 10**9 - 1):
        pair = source[index]
        assert (pair.image, pair.text) == (picture(1), "picture 1")
        assert pair.key == f"{tmp_path}/{index // rows:05d}.tar/k"
    start = time.process_time()
    assert len(open_source(f"tar:{tmp_path}/{{00000..{files - 1:05d}}}.tar")) == 10**9
    assert first < 10 and time.process_time() - start < 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 256  # MiB


def write_sparse_index(path: Path, about: dict[str, Any], rows: int, real: tuple[int, ...], tar: bytes) -> None:
    """An index of `rows` records, of which the `real` ones lie where the only one of `tar` lies."""
    shapes = {"faults": ("U8", [rows], 1), "keys": ("U8", [rows], 1), "members": ("U32", [2 * rows, 3], 12),
              "records": ("U32", [rows + 1, 2], 8)}  # fmt: skip
    header: dict[str, Any] = {"__metadata__": {"about": json.dumps(about)}}
    begin = 0
    starts = {}
    for name, (dtype, shape, size) in shapes.items():
        starts[name] = begin
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + shape[0] * size]}
        begin += shape[0] * size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        places = [(m.offset_data // 512, m.size, 1 + n) for n, m in enumerate(opened.getmembers())]
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        base = file.tell()
        file.truncate(base + begin)
        for row in real:
            file.seek(base + starts["records"] + 8 * row)
            file.write(np.array([[2 * row, row], [2 * row + 2, row + 1]], np.uint32).tobytes())
            file.seek(base + starts["members"] + 24 * row)
            file.write(np.array(places, np.uint32).tobytes())
            file.seek(base + starts["keys"] + row)
            file.write(b"k")


def test_numbers_of_records_are_kept_for_many_files(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "many", 70, 1)
    source = open_source(f"tar:{pattern}")
    assert isinstance(source, Shards)
    assert f"{_digest(TarFormat().kind, *source.files):016x}.rows" in {
        path.name for path in (tmp_path / "many").iterdir()
    }
    for index in (tmp_path / "many").glob("*.index"):
        index.unlink()
    again = open_source(f"tar:{pattern}")
    assert len(again) == 70 and not list((tmp_path / "many").glob("*.index"))
    assert again[69].text == "picture 69"  # looked through when it is asked for
    assert [path.name for path in (tmp_path / "many").glob("*.index")] == ["00069.tar.index"]
    (tmp_path / "many/00007.tar").write_bytes(tar_bytes([*record("x", 1), *record("y", 2)]))
    assert len(open_source(f"tar:{pattern}")) == 71


# --- hostile tars --------------------------------------------------------------------------------------------------


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/../../b", "C:\\x", "//x"])
def test_names_that_lead_out_are_refused(name: str, tmp_path: Path) -> None:
    assert reasons(tar_bytes(record("a", 0) + record(name, 1) + record("b", 2)), tmp_path) == [
        "picture 0", "unsafe_name", "picture 2"]  # fmt: skip


@pytest.mark.parametrize("kind, reason", [(tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "link"),
                                          (tarfile.FIFOTYPE, "special_file"), (tarfile.CHRTYPE, "special_file"),
                                          (tarfile.BLKTYPE, "special_file")])  # fmt: skip
def test_links_and_devices_are_refused(kind: bytes, reason: str, tmp_path: Path) -> None:
    members = [*record("a", 0), (special("b.jpg", kind, "/etc/passwd"), b""), ("b.txt", b"b"), *record("c", 2)]
    assert reasons(tar_bytes(members), tmp_path) == ["picture 0", reason, "picture 2"]


def test_duplicates_gaps_and_empty_members_have_their_reasons(tmp_path: Path) -> None:
    members = [
        *record("a", 0), *record("a", 1),
        ("b.jpg", picture(2)), ("c.txt", b"no image"), ("d.jpg", b""), ("d.txt", b"d"),
        ("e.jpg", picture(3)), ("e.txt", b" \n"), ("f.jpg", picture(3)), ("f.txt", b"caf\xe9"),
        ("g.jpg", picture(3)), ("g.txt", b"x" * 10_000_000),
        ("h.jpg", picture(3)), ("h.json", b"{\"caption\": "), ("i.jpg", picture(3)), ("i.json", b"[1, 2]"),
        ("j.jpg", picture(3)), ("j.json", b'{"caption": {"a": 1}}'),
        ("k.jpg", picture(3)), ("k.json", b'{"caption": null}'),
        ("l.jpg", picture(3)), ("l.json", b'{"caption": "\\ud800"}'), ("m.jpg", picture(3)), ("m.json", b"[" * 100_000),
        ("n.jpg", picture(3)), ("n.json", b'{"caption": "' + b"y" * 10_000_000 + b'"}'),
        ("README", b"no record"), (".hidden.jpg", b"none"), ("__meta__/x.json", b"none"), *record("z", 9),
    ]  # fmt: skip
    assert reasons(tar_bytes(members), tmp_path) == [
        "duplicate_key", "missing_caption", "missing_image", "empty_image", "empty_caption", "not_utf8", "long_caption",
        "bad_json", "wrong_type", "wrong_type", "missing_caption", "not_utf8", "bad_json", "long_caption", "picture 9",
    ]  # fmt: skip


def test_names_that_are_no_utf8_or_hold_line_breaks_stay_one_line(tmp_path: Path) -> None:
    tar = tar_bytes(
        [("n\nn.jpg", picture(1)), ("n\nn.txt", b"x"), ("caf\udce9.jpg", picture(2)), ("caf\udce9.txt", b"y")]
    )
    one, two = outcome(tar, tmp_path)
    assert isinstance(one, Pair) and one.key.endswith("n\\nn")
    assert isinstance(two, Pair) and two.key.endswith("caf\\xe9")


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    gnu = special("s.jpg", tarfile.GNUTYPE_SPARSE)
    pax = tarfile.TarInfo("t.jpg")
    pax.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,10",
        "GNU.sparse.size": "10",
    }
    for member in (gnu, pax):
        data = tar_bytes([*record("a", 0), (member, picture(1)), (member.name[0] + ".txt", b"s")], tarfile.PAX_FORMAT)
        assert reasons(data, tmp_path) == ["picture 0", "sparse"]


def whole_tar() -> bytes:
    return tar_bytes([member for i in range(5) for member in record(f"r{i}", i)])


@pytest.mark.parametrize("cut", [15_000, 13_000, 12_800])
def test_of_a_truncated_tar_the_records_before_are_used_and_the_last_is_named(
    cut: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = whole_tar()[:cut]
    with tarfile.open(fileobj=io.BytesIO(whole_tar())) as tar:  # what lies before the cut, by tarfile's own offsets
        before = [m.name for m in tar.getmembers() if m.offset < cut]
    last = before[-1].partition(".")[0]
    with caplog.at_level(logging.WARNING):
        found = reasons(data, tmp_path)
    complete = len({name.partition(".")[0] for name in before}) - 1
    assert found == [f"picture {i}" for i in range(complete)] + ["truncated"]
    assert any(
        f"records before {last} can be used" in r.getMessage() and "one.tar" in r.getMessage() for r in caplog.records
    )


def test_a_broken_header_ends_a_tar_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(whole_tar())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = tar.getmember("r3.jpg").offset
    data[offset + 148 : offset + 156] = b"99999999"  # its checksum
    with caplog.at_level(logging.WARNING):
        assert reasons(bytes(data), tmp_path) == ["picture 0", "picture 1", "truncated"]
    assert f"no header at byte {offset:,}" in caplog.text


def test_headers_that_claim_any_size_or_point_back_end_quickly(tmp_path: Path) -> None:
    def with_size(member: str, field: bytes) -> bytes:
        data = bytearray(whole_tar())
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            offset = tar.getmember(member).offset
        data[offset + 124 : offset + 136] = field
        checksum = sum(data[offset : offset + 512]) - sum(data[offset + 148 : offset + 156]) + 8 * 32
        data[offset + 148 : offset + 156] = b"%06o\0 " % checksum
        return bytes(data)

    negative = b"\xff" + (-1024).to_bytes(11, "big", signed=True)
    huge = b"\x80" + (1 << 70).to_bytes(11, "big")
    for field in (negative, huge, b"77777777777\0"):
        assert reasons(with_size("r3.jpg", field), tmp_path)[:3] in (
            ["picture 0", "picture 1", "picture 2"], ["picture 0", "picture 1", "truncated"])  # fmt: skip
    endless = special("x", tarfile.GNUTYPE_LONGNAME)
    endless.size = 0
    chain = b"".join(endless.tobuf(tarfile.GNU_FORMAT) for _ in range(5000))
    assert reasons(tar_bytes(record("a", 0) + record("b", 1))[:6144] + chain, tmp_path)[:1] == ["picture 0"]
    header = special("x", tarfile.XHDTYPE)
    header.size = 1 << 40
    assert reasons(whole_tar()[:4096] + header.tobuf(), tmp_path)[:1] == ["picture 0"]


@pytest.mark.parametrize(
    "data",
    [b"", b"no tar" * 500, gzip.compress(whole_tar()), b"\xff" * 2000, whole_tar()[:300], whole_tar()[:512]],
    ids=["empty", "text", "gzip", "ones", "cut", "one header"],
)
def test_what_is_no_tar_is_one_line(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises((DataError, RecordError)) as caught:
        open_source(f"tar:{tmp_path}/x.tar")[0]
    assert str(tmp_path / "x.tar") in str(caught.value) and "\n" not in str(caught.value)


def test_any_flipped_byte_is_a_pair_a_record_error_or_a_data_error(tmp_path: Path) -> None:
    rng, whole = np.random.default_rng(0), whole_tar()
    kinds: set[type] = set()
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        headers = [member.offset for member in tar.getmembers()]
    for _ in range(60):
        data = bytearray(whole)
        for offset in rng.choice(headers, 2):
            data[offset + int(rng.integers(0, 512))] ^= 1 << int(rng.integers(0, 8))
        try:
            kinds |= {type(one) for one in outcome(bytes(data), tmp_path)}
        except DataError as error:
            kinds.add(DataError)
            assert "\n" not in str(error)
    assert kinds >= {Pair, str}


def test_an_index_of_other_contents_does_no_harm(tmp_path: Path) -> None:
    """What a stranger has put beside a tar: an index whose places lie outside of it."""
    path = tmp_path / "a.tar"
    path.write_bytes(whole_tar())
    (stamp,) = storage.stamps([str(path)])
    about = {"kind": "tar-1", "stamp": stamp, "rows": 1, "damage": "", "names": ["", "jpg", "txt"], "faults": {}}
    arrays: dict[str, np.ndarray] = {"records": np.array([[0, 0], [2, 1]], np.uint32), "faults": np.zeros(1, np.uint8),
              "members": np.array([[9_000_000, 100, 1], [1, 5, 2]], np.uint32),
              "keys": np.frombuffer(b"k", np.uint8)}  # fmt: skip
    Path(f"{path}.index").write_bytes(save(arrays, {"about": json.dumps(about)}))
    with pytest.raises(RecordError, match="a.tar/k: cut off"):
        open_source(f"tar:{path}")[0]
    for name, wrong in (("records", np.zeros((1, 2), np.uint32)), ("members", np.zeros((2, 3), np.uint32) + 9)):
        Path(f"{path}.index").unlink()
        Path(f"{path}.index").write_bytes(save(arrays | {name: wrong}, {"about": json.dumps(about)}))
        shards._opened.cache_clear()
        with pytest.raises(RecordError, match="a.tar#0: not in its index"):
            open_source(f"tar:{path}")[0]
