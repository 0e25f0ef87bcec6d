"""CSV, TSV, JSON lines, Parquet and ArrayRecord files: what csv, json and pyarrow read is what is given."""

import base64
import csv
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet
from tars import picture

from clip_jax.data.sources import Pair, open_source
from clip_jax.data.sources.array_record import from_record, to_record
from clip_jax.data.sources.lines import row_starts
from clip_jax.errors import DataError, RecordError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CLIP_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / f"images/{i}.jpg").write_bytes(picture(i))
    return tmp_path


def reasons(spec: str) -> list[str]:
    """What each record is: its text, or the reason why it is none."""
    source, found = open_source(spec), []
    for i in range(len(source)):
        try:
            found.append(source[i].text)
        except RecordError as error:
            assert "\n" not in str(error) and f"#{i}: " in str(error)
            found.append(error.reason)
    return found


def refusal(spec: str) -> str:
    with pytest.raises(DataError) as caught:
        open_source(spec)[0]
    assert "\n" not in str(caught.value)
    return str(caught.value)


TEXTS = ["plain", 'with "quotes", commas', "two\nlines", "ключ 🗝"]


@pytest.mark.parametrize("kind, separator, ends", [("csv", ",", "\r\n"), ("csv", ";", "\n"), ("tsv", "\t", "\n")])
def test_rows_are_those_that_csv_reads(kind: str, separator: str, ends: str, folder: Path) -> None:
    table = folder / f"t.{kind}"
    with table.open("w", newline="", encoding="utf-8-sig") as file:  # with a byte-order mark, as spreadsheets write it
        writer = csv.writer(file, delimiter=separator, lineterminator=ends)
        writer.writerow(["id", "filepath", "title"])
        writer.writerows([i, f"images/{i}.jpg", text] for i, text in enumerate(TEXTS))
    with table.open(newline="", encoding="utf-8-sig") as file:
        expected = [(row["title"], row["filepath"]) for row in csv.DictReader(file, delimiter=separator)]
    source = open_source(f"{kind}:{table}" + (f"#separator={separator}" if separator == ";" else ""))
    assert [(source[i].text, source[i].image) for i in range(len(source))] == [
        (text, (folder / path).read_bytes()) for text, path in expected
    ]


def test_any_chunk_finds_the_same_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "x.csv"
    path.write_bytes(b'\n\na,b\r\n"x\n""\n",1\n   \n2,"\n\n"\nlast,"q"')
    expected = [2, 7, 21, 28]
    for chunk in (1, 2, 3, 5, 7, 1000):
        monkeypatch.setattr("clip_jax.data.sources.lines.CHUNK", chunk)
        starts, size = row_starts(str(path), quoted=True)
        assert (starts.tolist(), size) == (expected, path.stat().st_size), chunk
    rows = [line for line in csv.reader(path.open(newline="")) if any(cell.strip() for cell in line)]
    assert len(rows) == len(expected)


def test_json_lines_are_those_that_json_reads(folder: Path) -> None:
    rows: list[dict[str, Any]] = [{"file_name": f"images/{i}.jpg", "caption": text} for i, text in enumerate(TEXTS)]
    rows[1] = {"image": str(folder / "images/1.jpg"), "captions": ["one", "two"]}
    (folder / "t.jsonl").write_text("\n".join(json.dumps(row) + "\n" for row in rows))  # blank lines between
    source = open_source(f"jsonl:{folder}/t.jsonl")
    assert [source[i].text for i in range(4)] == ["plain", "one", "two\nlines", "ключ 🗝"]
    assert source[1].captions == ("one", "two") and source[3].image == picture(3)


BAD_LINES = {
    b'{"image": "images/0.jpg", "text": "good"}': "good",
    b'{"image": "images/0.jpg", "text": 3}': "wrong_type",
    b'{"image": 5, "text": "a"}': "wrong_type",
    b'{"image": "images/0.jpg"}': "missing_caption",
    b'{"text": "a"}': "missing_image",
    b'{"image": "images/0.jpg", "text": null}': "missing_caption",
    b'{"image": "images/0.jpg", "text": []}': "missing_caption",
    b'{"image": "images/0.jpg", "text": "  "}': "empty_caption",
    b'{"image": null, "text": "a"}': "missing_image",
    b'{"image": "images/9.jpg", "text": "a"}': "missing_image",
    b'{"image": "images", "text": "a"}': "missing_image",
    b'{"image": "/dev/zero", "text": "a"}': "missing_image",
    b'{"image": "a\\u0000b", "text": "a"}': "missing_image",
    b'{"image": "%s", "text": "a"}' % (b"n" * 5000): "missing_image",
    b'{"image": "images/0.jpg", "text": "caf\xe9"}': "not_utf8",
    b'{"image": "images/0.jpg", "text": "%s"}' % (b"x" * 10_000_000): "long_caption",
    b'{"image": "images/0.jpg", "text"': "bad_json",
    b"[1, 2]": "wrong_type",
    b"[" * 100_000: "bad_json",
    b"NaN": "wrong_type",
    b"\x00\x01\x02": "bad_json",
    b'{"image": "images/1.jpg", "text": "last"}': "last",
}


def test_each_bad_json_line_has_its_reason(folder: Path) -> None:
    (folder / "t.jsonl").write_bytes(b"\n".join(BAD_LINES))
    assert reasons(f"jsonl:{folder}/t.jsonl") == list(BAD_LINES.values())


def test_each_bad_row_has_its_reason(folder: Path) -> None:
    rows = [b"filepath,title", b"images/0.jpg,good", b"images/0.jpg", b"images/0.jpg,a,b", b"images/9.jpg,a",
            b"images/0.jpg,caf\xe9", b",a", b"images/0.jpg,", b"images/1.jpg,last"]  # fmt: skip
    (folder / "t.csv").write_bytes(b"\n".join(rows))
    assert reasons(f"csv:{folder}/t.csv") == ["good", "ragged_row", "ragged_row", "missing_image", "not_utf8",
                                              "missing_image", "empty_caption", "last"]  # fmt: skip


@pytest.mark.parametrize(
    "name, data, expected",
    [
        ("x.csv", b"", "empty; expected a line of column names"),
        ("x.jsonl", b" \n\n", "empty; expected JSON lines"),
        ("x.csv", b"url,words\na,b", "columns url, words; expected one of text"),
        ("x.csv", b"path,path\na,b", "two columns 'path'"),
        ("x.csv", b"path,text\n", "is empty: expected at least one record"),
        ("x.jsonl", b"\x1f\x8b\x08data", "compressed"),
        ("x.parquet", b"PAR1 no", "not a readable Parquet file"),
        ("x.array_record", b"no record", "not a readable ArrayRecord file"),
    ],
)
def test_tables_that_can_not_be_read_are_one_line(name: str, data: bytes, expected: str, folder: Path) -> None:
    (folder / name).write_bytes(data)
    message = refusal(f"{name.partition('.')[2]}:{folder / name}")
    assert expected in message and str(folder / name) in message


def write_parquet(path: Path, columns: dict[str, Any], rows: int = 2) -> str:
    parquet.write_table(pa.table(columns), path, row_group_size=rows)
    return f"parquet:{path}"


@pytest.mark.parametrize(
    "image, value",
    [
        ("image", lambda i: {"bytes": picture(i), "path": f"{i}.jpg"}),  # Hugging Face's
        ("image", lambda i: {"bytes": None, "path": f"images/{i}.jpg"}),
        ("jpg", picture),  # img2dataset's
        ("image_path", lambda i: f"images/{i}.jpg"),
    ],
)
def test_parquet_rows_are_those_that_pyarrow_reads(image: str, value: Callable[[int], Any], folder: Path) -> None:
    spec = write_parquet(
        folder / "0.parquet", {image: [value(i) for i in range(4)] + [value(0)], "caption": [*"abcde"]}
    )
    write_parquet(folder / "1.parquet", {image: [value(2)], "caption": ["f"]})
    source = open_source(f"parquet:{folder}")
    rows = parquet.read_table(folder / "0.parquet").to_pylist() + parquet.read_table(folder / "1.parquet").to_pylist()
    assert [source[i].text for i in range(len(source))] == [row["caption"] for row in rows]
    assert [source[i].image for i in (5, 0, 3, 4)] == [picture(i) for i in (2, 0, 3, 0)]
    assert not list(folder.glob("*.index"))
    assert "no option" in refusal(f"{spec}#separator=,")


def test_columns_are_chosen_and_those_there_are_are_named(folder: Path) -> None:
    data = {"picture": [picture(0)], "alt": [["one", "two"]], "n": [1]}
    spec = write_parquet(folder / "x.parquet", data)
    pair = open_source(f"{spec}#image=picture&text=alt")[0]
    assert (pair.image, pair.captions) == (picture(0), ("one", "two"))
    assert "columns picture, alt, n; expected one of image" in refusal(spec)
    assert "columns picture, alt, n; expected words for the caption" in refusal(f"{spec}#image=picture&text=words")


def test_numbers_of_classes_are_read_as_their_names(folder: Path) -> None:
    about = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": [picture(i) for i in range(3)], "label": [1, 0, 7]})
    parquet.write_table(table.replace_schema_metadata({"huggingface": json.dumps(about)}), folder / "x.parquet")
    assert reasons(f"parquet:{folder}/x.parquet") == ["dog", "cat", "wrong_type"]


def test_nulls_and_wrong_types_in_parquet_have_their_reasons(folder: Path) -> None:
    image = pa.array([picture(0), None, b"", picture(1), picture(1), picture(2)], pa.binary())
    text = pa.array(["good", "a", "b", None, "  ", "last"], pa.string())
    spec = write_parquet(folder / "x.parquet", {"image": image, "text": text})
    assert reasons(spec) == ["good", "missing_image", "empty_image", "missing_caption", "empty_caption", "last"]
    assert reasons(write_parquet(folder / "y.parquet", {"image": [1, 2], "text": ["a", "b"]})) == ["wrong_type"] * 2
    assert reasons(write_parquet(folder / "z.parquet", {"image": [picture(0)], "text": [1.5]})) == ["wrong_type"]
    binary = pa.array([b"fine", b"caf\xe9"], pa.binary())
    assert reasons(write_parquet(folder / "w.parquet", {"image": image[:2].fill_null(b"x"), "text": binary})) == [
        "fine", "not_utf8"]  # fmt: skip


def test_damaged_pages_of_parquet_are_record_errors(folder: Path) -> None:
    path = folder / "x.parquet"
    spec = write_parquet(path, {"image": [picture(i) for i in range(6)], "text": [*"abcdef"]})
    data = bytearray(path.read_bytes())
    data[200:2500] = bytes(2300)
    path.write_bytes(data)
    found = reasons(spec)
    assert found[-2:] == ["e", "f"] and found[0] == "unreadable"


PAIRS = [
    Pair("a/1", picture(1), "a cat", ("red", "blue"), "g", "s", ("a cat", "ein Kater")),
    Pair("b", picture(2), "ключ"),
]


def write_array_record(path: Path, records: Iterable[bytes]) -> str:
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    return f"array_record:{path}"


def test_array_record_files_that_are_cut_off_are_refused(folder: Path) -> None:
    path = folder / "x.array_record"
    spec = write_array_record(path, [to_record(PAIRS[0])] * 100)
    data = path.read_bytes()
    for keep in (0, 1000, 70_000, len(data) - 10):
        path.write_bytes(data[:keep])
        assert f"{path}: not a readable ArrayRecord file" in refusal(spec)
    write_array_record(path, [])
    assert "is empty" in refusal(spec)


def test_records_are_read_by_the_form_that_is_documented(folder: Path) -> None:
    about = json.dumps({"key": "k", "text": "by hand"}).encode()
    by_hand = np.uint32(len(about)).tobytes() + about + picture(3)
    source = open_source(write_array_record(folder / "x.array_record", [*map(to_record, PAIRS), by_hand]))
    assert [source[i] for i in range(3)] == [*PAIRS, Pair("k", picture(3), "by hand")]


@pytest.mark.parametrize(
    "record", [b"", b"\xff\xff\xff\xff{}", b"\x02\0\0\0{}x", b"\x02\0\0\0[]x", b"\x04\0\0\0null",
               to_record(PAIRS[1])[:9], b'\x17\0\0\0{"key":1, "text": "ab"}x', base64.b64encode(to_record(PAIRS[0]))]
)  # fmt: skip
def test_other_records_are_refused(record: bytes) -> None:
    with pytest.raises(RecordError, match="^x#1: not a pair"):
        from_record(record, "x#1")
