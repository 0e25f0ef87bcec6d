"""`launch.prepare index` and `convert`: what is written reads back the same, and a restart goes on."""

import json
import tarfile
from pathlib import Path

import pytest
from tars import picture, record, tar_bytes, write_shards

from clip_jax.data import converting
from clip_jax.data.sources import open_source
from clip_jax.errors import RecordError
from launch import prepare

BAD = [*record("a", 0), ("b.jpg", picture(1)), ("c.jpg", b"<svg/>"), ("c.txt", b"no picture"),
       ("d.jpg", picture(2)), ("d.txt", b""), *record("../e", 3), *record("f", 4), *record("g", 5)]  # fmt: skip
REASONS = {"missing_caption": 1, "not_an_image": 1, "empty_caption": 1, "unsafe_name": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    prepare.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return printed.out, printed.err


def refusal(*arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        prepare.main([str(argument) for argument in arguments])
    assert str(caught.value).startswith("error: ") and "\n" not in str(caught.value)
    return str(caught.value)


def bad_tar(folder: Path) -> Path:
    path = folder / "bad.tar"
    path.write_bytes(tar_bytes(BAD))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".tar", ".array_record")}


def test_index_tells_rows_sizes_and_faults_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"tar:{write_shards(tmp_path / 'web', 3, 4)}"
    size = sum(path.stat().st_size for path in (tmp_path / "web").iterdir())
    (tmp_path / "web/00001.tar.index").write_bytes(b"of a run that was killed")
    out, err = run(capsys, "index", spec, "--workers", 2)
    assert out == f"{spec}: 12 rows, {size / 1e9:,.3f} GB, 3 files\n" and "bad" not in err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "web").glob("*.index")}
    assert run(capsys, "index", spec, "--workers", 1)[0] == out and len(before) == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    out, _ = run(capsys, "index", f"tar:{bad_tar(tmp_path)}", "--workers", 1)
    assert "7 rows" in out and "1 rows can't be used: 1 unsafe_name" in out
    figures = json.loads(run(capsys, "index", spec, "--workers", 1, "--json")[0])
    assert figures == {"rows": 12, "bytes": size, "files": 3, "damaged": 0, "faults": {}}


def test_a_bad_shard_is_named_and_left_out_only_with_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = f"tar:{write_shards(tmp_path / 'web', 3, 2)}"
    (tmp_path / "web/00001.tar").write_bytes(b"no tar")
    whole = (tmp_path / "web/00002.tar").read_bytes()
    (tmp_path / "web/00002.tar").write_bytes(whole[:5000])
    assert "1 of 3 files can't be read" in refusal("index", spec, "--workers", 1)
    err = capsys.readouterr().err
    assert f"bad: {tmp_path}/web/00001.tar: not a readable tar" in err
    assert f"damaged: {tmp_path}/web/00002.tar: " in err and "records before" in err
    out, err = run(capsys, "index", spec, "--workers", 1, "--leave-out-bad")
    assert "4 rows" in out and "2 of them damaged" in out and "(left out)" in err
    source = open_source(spec)
    assert [source[i].text for i in range(3)] == ["picture 0", "picture 1", "picture 4"]
    with pytest.raises(RecordError, match="00002.tar/000020001: cut off"):
        source[3]
    assert "1 of 3 files can't be read" in refusal("index", spec, "--workers", 1)


@pytest.mark.parametrize("kind", ["tar", "array_record"])
def test_what_is_written_reads_back_the_same(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = bad_tar(tmp_path), tmp_path / "out"
    out, _ = run(capsys, "convert", f"tar:{path}", "--to", f"{kind}:{folder}", "--shard-size", 3, "--workers", 2)
    assert "3 of 7 rows written" in out and "3 shards" in out and "4 left out: " in out
    assert all(f"{count} {reason}" in out for reason, count in REASONS.items())
    again = run(capsys, "convert", f"tar:{path}", "--to", f"{kind}:{folder}", "--shard-size", 3, "--json")[0]
    figures = json.loads(again)
    assert (figures["rows"], figures["written"], figures["shards"], figures["left_out"]) == (7, 3, 3, dict(REASONS))
    assert sorted(contents(folder)) == [f"0000{i}.{kind}" for i in range(3)]
    source = open_source(f"{kind}:{folder}")
    assert [(source[i].image, source[i].text) for i in range(len(source))] == [
        (picture(i), f"picture {i}") for i in (0, 4, 5)]  # fmt: skip


def test_everything_of_a_pair_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_source("emoji:unseen_concepts_held_out_style")
    run(capsys, "convert", "emoji:unseen_concepts_held_out_style", "--to", f"array_record:{tmp_path}/a", "--workers", 1)
    run(capsys, "convert", "emoji:unseen_concepts_held_out_style", "--to", f"tar:{tmp_path}/t", "--workers", 1)
    after = open_source(f"array_record:{tmp_path}/a")
    assert len(after) == len(before) and all(after[i] == before[i] for i in range(0, len(before), 17))
    tars = open_source(f"tar:{tmp_path}/t")
    assert all((tars[i].image, tars[i].text) == (before[i].image, before[i].text) for i in range(0, len(before), 17))
    with tarfile.open(tmp_path / "t/00000.tar") as tar:
        names = tar.getnames()[:3]
        about = json.loads(tar.extractfile("000000000000.json").read())  # type: ignore[union-attr]
    assert names == [f"000000000000.{suffix}" for suffix in ("webp", "txt", "json")]
    assert (about["key"], tuple(about["keywords"]), about["style"]) == (
        before[0].key,
        before[0].keywords,
        before[0].style,
    )


def test_a_restart_writes_the_same_bytes_and_only_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["convert", f"tar:{bad_tar(tmp_path)}", "--shard-size", "2", "--workers", "1"]
    expected_out, _ = run(capsys, *arguments, "--to", f"tar:{tmp_path}/whole")
    expected = contents(tmp_path / "whole")
    moved: list[str] = []
    move = converting.storage.move

    def stop_at_third(file: Path, url: str) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(url)
        move(file, url)

    folder = tmp_path / "again"
    monkeypatch.setattr(converting.storage, "move", stop_at_third)
    with pytest.raises(SystemExit, match="130"):
        prepare.main([*arguments, "--to", f"tar:{folder}"])
    assert sorted(contents(folder)) == ["00000.tar", "00001.tar"]
    (folder / ".convert-killed").mkdir()
    monkeypatch.setattr(converting.storage, "move", move)
    times = {name: (folder / name).stat().st_mtime_ns for name in contents(folder)}
    out, _ = run(capsys, *arguments, "--to", f"tar:{folder}")
    assert contents(folder) == expected
    assert out.replace(str(folder), "") == expected_out.replace(f"{tmp_path}/whole", "")
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times
    assert not list(folder.glob(".convert-*"))
    assert "name another folder" in refusal(*arguments[:3], "3", "--to", f"tar:{folder}")


def test_wrong_arguments_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    spec = "emoji:unseen_concepts"
    assert "expected KIND:FILES with KIND one of tar, parquet" in refusal("index", "emoji:train")
    assert "expected tar:DIR or array_record:DIR" in refusal("convert", spec, "--to", "zip:x")
    assert "on a disk" in refusal("convert", spec, "--to", "array_record:s3://b/x")
    assert "at least 1" in refusal("convert", spec, "--to", f"tar:{tmp_path}/x", "--shard-size", "0")
    assert f"{tmp_path}/file/convert.json: " in refusal(
        "convert", spec, "--to", f"tar:{tmp_path}/file", "--workers", "1"
    )
    assert "nowhere" in refusal("index", f"tar:{tmp_path}/nowhere/*.tar")
