"""MMC4 and OBELICS as published: every image where its page has it, the filters, and one line for what is wrong.

The oracle of the order walks over the sentences, as the reader of a page does; MMC4 lists its images in another order.
"""

import base64
import gzip
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clip_jax.data import transforms
from clip_jax.data.order import Order
from clip_jax.data.sources.storage import list_files
from clip_jax.errors import DataError, RecordError
from flamingo_jax.data.documents import END, Shape, Text
from flamingo_jax.data.filters import Filters, LeftOutError
from flamingo_jax.data.media import Page, decode
from flamingo_jax.data.mixture import PageElements
from flamingo_jax.data.pages import open_pages
from flamingo_jax.data.tokenizer import open_tokenizer
from flamingo_jax.data.web import Mmc4, Obelics

COLOURS = 40  # images that their red tells apart: 6, 12, 18, …


def png(number: int, size: int = 16) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (6 * number, 0, 0)).save(file, "png")
    return file.getvalue()


def name(number: int) -> str:
    return f"{number:012x}.png"


def url(number: int) -> str:
    return f"http://example.org/{number}.png"


def document(places: Sequence[int], sentences: int, first: int = 0, **more: Any) -> dict[str, Any]:
    """As MMC4 has it; image i, of number first + i, stands at sentence places[i]."""
    matrix = [[0.5 if j == place else 0.1 for j in range(sentences)] for place in places]
    info = [
        {"face_detections": None, "image_name": name(first + i), "raw_url": url(first + i), "matched_sim": 0.5,
         "matched_text_index": place}
        for i, place in enumerate(places)
    ]  # fmt: skip
    texts = [f"Sentence {j}." for j in range(sentences)]
    return {"text_list": texts, "image_info": info, "similarity_matrix": matrix, "url": "http://example.org"} | more


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def number(raw: Any) -> int:
    (image,) = decode(raw, 1, "")
    return np.asarray(image)[0, 0, 0] // 6


def said(page: Page) -> str:
    """The page in a line: <number of the image>, | for an end."""
    return "".join(
        "|" if p is END else p.text if isinstance(p, Text) else f"<{number(p)}>" for p in page.parts
    )  # fmt: skip


def read_aloud(places: Sequence[int], sentences: int, first: int = 0) -> str:
    """The oracle: before each sentence, the images that are assigned to it."""
    text = ""
    for j in range(sentences):
        for i in range(len(places)):
            if places[i] == j:
                text = text.rstrip(" ") + f"{'|' if text else ''}<{first + i}>"
        text += f"Sentence {j}. "
    return text.rstrip(" ") + "|"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(COLOURS):
        (folder / name(i)).write_bytes(png(i))
    return folder


def test_images_stand_before_their_sentences(images: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cases = [([2, 1], 3)] + [(rng.integers(0, 6, size=rng.integers(1, 9)).tolist(), 6) for _ in range(60)]
    records = [document(places, sentences) for places, sentences in cases]
    (tmp_path / "docs_0.jsonl").write_bytes(lines(*records))
    pages = open_pages("interleaved", f"mmc4:{tmp_path}/docs_0.jsonl#{images}")
    found = [said(pages[i]) for i in range(len(pages))]
    assert found == [read_aloud(*case) for case in cases]
    assert found[0] == "Sentence 0.|<1>Sentence 1.|<0>Sentence 2.|"  # not <0>, <1>, the order of the file
    assert sum(places != sorted(places) for places, _ in cases) > 40


def test_a_token_sees_the_image_that_the_page_has_before_it(images: Path, tmp_path: Path) -> None:
    """Through tokens and masks: of each sentence, the number of the image that its words attend."""
    places = [3, 0, 2]
    (tmp_path / "docs.jsonl").write_bytes(lines(document(places, 4, first=5)))
    tokenizer = open_tokenizer("wordnet/tokenizer.json", "<|bos|>")
    pages = open_pages("interleaved", f"mmc4:{tmp_path}/docs.jsonl#{images}")
    plain = transforms.Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    made = PageElements(pages, Order(1, 0), tokenizer, Shape(5, 1, 16, 64), 4096, plain, random_window=True)(0)
    seen = {}
    for j in range(4):  # the token of the digit
        digit = tokenizer.encode(f"{j}")[0]
        (at,) = np.flatnonzero(made["text"] == digit)
        (image,) = np.flatnonzero(made["media_mask"][at])
        seen[j] = int(made["media"][image, 0, 0, 0, 0]) // 6
    assert seen == {0: 5 + 1, 1: 5 + 1, 2: 5 + 2, 3: 5 + 0}


def test_every_way_in_which_shards_and_images_are_kept(images: Path, tmp_path: Path) -> None:
    cases = [[1, 0], [2], [0, 0, 2], [1, 1]]
    records = [document(places, 3, first=4 * i) for i, places in enumerate(cases)]
    expected = [read_aloud(places, 3, first=4 * i) for i, places in enumerate(cases)]
    for shard in range(2):
        data = lines(*records[2 * shard : 2 * shard + 2])
        (tmp_path / f"plain_{shard}.jsonl").write_bytes(data)
        (tmp_path / f"packed_{shard}.jsonl.gz").write_bytes(gzip.compress(data))
        with zipfile.ZipFile(tmp_path / f"docs_no_face_shard_{shard}_v2.jsonl.zip", "w") as archive:
            archive.writestr(f"docs_no_face_shard_{shard}_v2.jsonl", data)
        folder = tmp_path / "by_shard" / str(shard)
        folder.mkdir(parents=True)
        for i in range(8):
            (folder / name(8 * shard + i)).write_bytes(png(8 * shard + i))
    tar(tmp_path / "images_a.tar", {f"sub/{name(i)}": png(i) for i in range(8)})
    tar(tmp_path / "images_b.tar", {f"sub/{name(i)}": png(i) for i in range(8, 16)})
    downloaded: dict[str, bytes] = {}
    for i in range(16):  # as img2dataset leaves them
        downloaded |= {f"{i:09}.jpg": png(i), f"{i:09}.json": json.dumps({"url": url(i), "status": "success"}).encode()}
    tar(tmp_path / "00000.tar", downloaded)
    for record in records:  # OpenFlamingo's shards, as its converter writes them and as they should be
        for i, info in enumerate(record["image_info"]):
            encoded = base64.b64encode((images / info["image_name"]).read_bytes())
            info["image_base64"] = str(encoded) if i % 2 else encoded.decode()
    tar(tmp_path / "000000000.tar", {f"{i:032x}.json": json.dumps(record).encode() for i, record in enumerate(records)})
    for spec in (
        f"plain_{{0..1}}.jsonl#{images}",
        f"packed_*.jsonl.gz#{tmp_path}/by_shard",
        f"docs_no_face_shard_{{0,1}}_v2.jsonl.zip#{tmp_path}/images_{{a,b}}.tar",
        f"plain_*.jsonl#{tmp_path}/00000.tar",
        "000000000.tar",
    ):
        for _ in range(2):  # the second time from the index beside the shards
            pages = Mmc4(f"{tmp_path}/{spec}")
            assert [said(pages[i]) for i in range(len(pages))] == expected, spec
    (tmp_path / "a[1].jsonl").write_bytes(lines(records[1]))  # as a pattern, it would be a1.jsonl
    assert said(Mmc4(f"{tmp_path}/a[1].jsonl#{images}")[0]) == expected[1]
    (tmp_path / "a[1].tsv").write_text("image\ttext\n")
    assert list_files(f"{tmp_path}/a[1].tsv", ".tsv") == [f"{tmp_path}/a[1].tsv"]
    index = tmp_path / "plain_0.jsonl.lines.npy"
    stale = index.read_bytes()
    (tmp_path / "plain_0.jsonl").write_bytes(lines(records[2], records[0], records[1]))
    assert said(Mmc4(f"{tmp_path}/plain_0.jsonl#{images}")[1]) == expected[0]
    assert index.read_bytes() != stale
    index.write_bytes(b"damaged")
    assert said(Mmc4(f"{tmp_path}/plain_0.jsonl#{images}")[2]) == expected[1]


def test_filters_leave_images_and_pages_out_and_keep_the_order(images: Path, tmp_path: Path) -> None:
    def pages(options: str, *records: Any) -> Mmc4:
        (tmp_path / "docs.jsonl").write_bytes(lines(*records))
        return Mmc4(f"{tmp_path}/docs.jsonl#{images}?{options}")

    record = document([2, 1, 0, 1], 3)
    for i, value in enumerate((0.3, 0.23, 0.24, 0.9)):
        record["image_info"][i]["matched_sim"] = value
    page = pages("min_similarity=0.24", record)[0]
    assert said(page) == "<2>Sentence 0.|<3>Sentence 1.|<0>Sentence 2.|" and page.dropped == ["low_similarity"]
    del record["image_info"][0]["matched_sim"]  # then the matrix has it: 0.5
    assert said(pages("min_similarity=0.4", record)[0]) == "Sentence 0.|<3>Sentence 1.|<0>Sentence 2.|"

    marked = document([0, 1, 2], 3)
    marked["image_info"][0] |= {"face_detections": [[0, 0, 9, 9]]}
    marked["image_info"][1] |= {"nsfw": 0.9}
    assert said(pages("", marked)[0]) == "<0>Sentence 0. Sentence 1.|<2>Sentence 2.|"
    assert pages("faces=drop", marked)[0].dropped == ["faces", "marked_nsfw"]
    assert said(pages("nsfw=keep", marked)[0]) == read_aloud([0, 1, 2], 3)
    for mark, kept in (("UNLIKELY", 3), ("NSFW", 2), ("UNSURE", 3), (True, 2), (False, 3), (None, 3)):
        marked["image_info"][1]["nsfw"] = mark
        assert len(pages("", marked)[0].media) == kept

    for options, changed, reason in (
        ("min_images=3", document([0, 1], 3), "too_few_images"),
        ("max_images=1", document([0, 1], 3), "too_many_images"),
        ("min_similarity=0.6", document([0, 1], 3), "too_few_images"),
        ("min_bytes=10000", document([0, 1], 3), "too_few_images"),
        ("duplicates=drop", document([0], 3, could_have_url_duplicate=1), "may_be_a_duplicate"),
        ("single_rate=0", document([0], 3), "one_image"),
        ("", document([0], 3, first=COLOURS), "too_few_images"),  # not downloaded
    ):
        with pytest.raises(LeftOutError) as error:
            pages(options, changed)[0]
        assert error.value.reason == reason
    assert len(pages("max_images=0", document([0] * 39, 3))[0].media) == 39


def test_one_image_is_enough_at_the_rate_of_the_option(images: Path, tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_bytes(lines(*[document([0], 1, first=i % COLOURS) for i in range(1000)]))
    source = Mmc4(f"{tmp_path}/docs.jsonl#{images}?single_rate=0.5")
    kept = []
    for i in range(1000):
        try:
            kept.append(source[i] is not None)
        except LeftOutError:
            kept.append(False)
    assert 0.45 < np.mean(kept) < 0.55  # a standard deviation is 0.016
    refilled = open_pages("interleaved", f"mmc4:{tmp_path}/docs.jsonl#{images}?single_rate=0.5")
    keys = [refilled[i].key for i in range(1000)]
    assert keys == [refilled[i].key for i in range(1000)]  # the index alone decides
    assert all(key.endswith(f":{i + 1}") for i, key in enumerate(keys) if kept[i])
    numbers = [int(key.rpartition(":")[2]) - 1 for key in keys]
    assert all(kept[i] for i in numbers) and len(set(numbers)) > 0.9 * sum(kept)
    with pytest.raises(DataError, match="1000 pages in a row were left out by filters, the last one"):
        open_pages("interleaved", f"mmc4:{tmp_path}/docs.jsonl#{images}?min_images=2")[0]


def without(field: str) -> dict[str, Any]:
    return {key: value for key, value in document([0], 2).items() if key != field}


def info(**changed: Any) -> dict[str, Any]:
    record = document([0, 1], 2)
    record["image_info"][1] |= changed
    return record


BAD_MMC4: dict[str, tuple[Any, str, str]] = {
    "negative": (info(matched_text_index=-1), "image 1 stands at text -1; expected one of 0", "index_out_of_range"),
    "beyond": (info(matched_text_index=2), "image 1 stands at text 2", "index_out_of_range"),
    "truth": (info(matched_text_index=True), "image 1 stands at text True", "index_out_of_range"),
    "no index": (info(matched_text_index=None), "image 1 stands at text None", "index_out_of_range"),
    "fraction": (info(matched_text_index=0.5), "image 1 stands at text 0.5", "index_out_of_range"),
    "huge": (info(matched_text_index=10**30), "image 1 stands at text 1000", "index_out_of_range"),
    "no texts": (without("text_list"), "text_list is not there; expected a list", "no_field"),
    "no images": (without("image_info"), "image_info is not there; expected a list", "no_field"),
    "null texts": (info() | {"text_list": None}, "image 0 stands at text 0", "index_out_of_range"),
    "text": (info() | {"text_list": "a text"}, "text_list is str; expected a list", "wrong_type"),
    "number among texts": (info() | {"text_list": ["a", 3]}, "text 1 is int; expected a text", "wrong_type"),
    "null among texts": (info() | {"text_list": [None, "a"]}, "text 0 is NoneType; expected a text", "wrong_type"),
    "null image": (info() | {"image_info": [None]}, "image 0 is NoneType; expected an object", "wrong_type"),
    "name": (info(image_name=["a"]), r"image 1: its name is \['a'\]; expected a text", "wrong_type"),
    "NaN": (info(matched_sim=float("nan")), "similarity nan of image 1; expected a number", "wrong_type"),
    "similarity": (info(matched_sim="high"), "similarity 'high' of image 1", "wrong_type"),
    "no similarity": (info(matched_sim=None) | {"similarity_matrix": [[0.5]]}, "no similarity of image 1",
                      "no_similarity"),
    "cut base64": (info(image_base64="iVBORw0KGgoAAAANSUhEUg=A"), "image 1: not base64", "bad_base64"),
    "no base64": (info(image_base64="<b>é</b>"), "image 1: not base64", "bad_base64"),
    "list of base64": (info(image_base64=[1]), "image 1 is list; expected base64", "bad_base64"),
    "a 10-MB text": (info() | {"text_list": ["a" * 10_000_000, "b"]}, "10,000,001 characters", "text_too_long"),
    "half a character": (info() | {"text_list": ["\ud83d", "b"]}, "not valid Unicode", "text_not_unicode"),
    "more images than said": (info() | {"image_info": [{"matched_text_index": 0}] * 20_000}, "20,000 image_info",
                              "too_many_parts"),
    "an array": ([1, 2], "list; expected a JSON object", "not_a_json_object"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MMC4)
def test_a_damaged_mmc4_record_is_one_line(case: str, images: Path, tmp_path: Path) -> None:
    record, message, reason = BAD_MMC4[case]
    (tmp_path / "docs.jsonl").write_bytes(lines(document([0], 1), record))
    pages = open_pages("interleaved", f"mmc4:{tmp_path}/docs.jsonl#{images}?min_similarity=0.1")
    with pytest.raises(RecordError, match=message) as error:
        pages[1]
    assert str(error.value).startswith(f"{tmp_path}/docs.jsonl:2") and "\n" not in str(error.value)
    assert error.value.reason == reason and len(str(error.value)) < 400
    assert len(pages[0].media) == 1


def test_lines_that_are_no_json_and_cut_shards(images: Path, tmp_path: Path) -> None:
    good = lines(document([0], 1))
    deep = b"[" * 100_000 + b"\n"
    (tmp_path / "docs.jsonl").write_bytes(good + b'{"text_list": [\n' + deep + b"\xff\xfe\n" + good)
    pages = Mmc4(f"{tmp_path}/docs.jsonl#{images}")
    for i in (1, 2, 3):
        with pytest.raises(RecordError, match=f"docs.jsonl:{i + 1}: not JSON") as error:
            pages[i]
        assert error.value.reason == "not_json"
    assert len(pages[4].media) == 1

    whole = tar(tmp_path / "whole.tar", {f"{i}.json": good for i in range(3)}).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:2500])  # within the third
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
            link = tarfile.TarInfo("../../a.json")
            link.type, link.linkname = kind, "/etc/passwd"
            archive.addfile(link)
    assert len(Mmc4(f"{tmp_path}/cut.tar#{images}")) == 2 and len(Mmc4(f"{tmp_path}/cut.tar#{images}")[1].media) == 1
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(good * 50)[:-20])
    (tmp_path / "none.jsonl.zip").write_bytes(b"PK")
    with zipfile.ZipFile(tmp_path / "other.jsonl.zip", "w") as other:
        other.writestr("a.txt", "a")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    for shards, message in (
        ("cut.jsonl.gz", "cut.jsonl.gz: can't be read"),
        ("none.jsonl.zip", "none.jsonl.zip: can't be read"),
        ("other.jsonl.zip", "no .jsonl in it"),
        ("links.tar", "empty; expected"),
        ("empty.jsonl", "empty; expected"),
        ("{0..3}.jsonl", r"0.jsonl: no such file \(4 of 4 in"),
        ("*.json", "no such files"),
        ("docs.jsonl#nowhere", "nowhere: no such file"),
    ):
        with pytest.raises(DataError, match=message):
            Mmc4(f"{tmp_path}/{shards}" + ("" if "#" in shards else f"#{images}"))
    for options, message in (
        ("min_sim=1", "option 'min_sim': expected one of min_similarity, "),
        ("min_images=x", "min_images=x: expected a number"),
        ("faces=no", "faces=no: expected keep or drop"),
        ("min_similarity=nan", "expected a finite number"),
    ):
        with pytest.raises(DataError, match=message):
            Mmc4(f"{tmp_path}/docs.jsonl#{images}?{options}")
    with pytest.raises(DataError, match="no images; expected SHARDS#FOLDER or SHARDS#TARS"):
        Mmc4(f"{tmp_path}/docs.jsonl")


def test_no_name_leads_out_of_the_folder(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(3))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    record = document([0] * 5, 1)
    names = ["../secret.png", str(tmp_path / "secret.png"), "link.png", "a\0b", "x" * 5000]
    for one, wanted in zip(record["image_info"], names, strict=True):
        one["image_name"] = wanted
    (tmp_path / "docs.jsonl").write_bytes(lines(record))
    page = Mmc4(f"{tmp_path}/docs.jsonl#{folder}?min_images=0")[0]
    assert page.media == [] and page.dropped == ["not_there"] * 5


ROWS: list[tuple[list[Any], list[Any]]] = [
    (["0", None, "1", None], [None, "one", None, "two"]),
    ([None, "2", None], ["Before", None, "<image> after"]),
    ([None, None, "3"], ["a", "b", None]),
]
SAID = ["<0>one|<1>two|", "Before|<2>after|", "a\n\nb|<3>|"]


def parquet(path: Path, rows: Sequence[tuple[list[Any], list[Any]]], of: Any, **columns: Any) -> Path:
    table = {"images": [[of(i) if i is not None else None for i in images] for images, _ in rows],
             "texts": [texts for _, texts in rows]}  # fmt: skip
    pq.write_table(pa.table(table | columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize("kept", ["bytes", "structs", "folder", "img2dataset"])
def test_obelics_with_its_images_kept_in_every_way(kept: str, tmp_path: Path) -> None:
    of = {
        "bytes": lambda i: png(int(i)),
        "structs": lambda i: {"bytes": png(int(i)), "path": None},
        "folder": lambda i: url(int(i)),
        "img2dataset": lambda i: url(int(i)),
    }[kept]
    for part in range(2):
        rows = ROWS[2 * part : 2 * part + 2]
        metadata = [json.dumps([{"alt_text": "a"} if i else None for i in images]) for images, _ in rows]
        parquet(tmp_path / f"train-0000{part}.parquet", rows, of, metadata=metadata)
    where = ""
    if kept == "folder":
        (tmp_path / "files").mkdir()
        for i in range(4):
            digest = hashlib.sha256(url(i).encode()).hexdigest()
            (tmp_path / "files" / (digest + (".png" if i % 2 else ""))).write_bytes(png(i))
        where = f"#{tmp_path}/files"
    elif kept == "img2dataset":
        members: dict[str, bytes] = {}
        for i in range(4):
            members |= {f"{i:05}.json": json.dumps({"url": url(i)}).encode(), f"{i:05}.png": png(i)}
        where = f"#{tar(tmp_path / '00000.tar', members)}"
    pages = open_pages("interleaved", f"obelics:{tmp_path}/train-*.parquet{where}")
    assert [said(pages[i]) for i in (2, 0, 1)] == [SAID[2], SAID[0], SAID[1]]
    assert len(pages) == 3


def test_a_damaged_obelics_record_is_one_line(tmp_path: Path) -> None:
    cases: list[tuple[tuple[Any, Any], Any, str]] = [
        ((["0", None], [None]), None, "lengths_differ"),
        ((["0"], ["both"]), None, "neither_image_nor_text"),
        (([None], [None]), None, "neither_image_nor_text"),
        ((None, None), None, "too_few_images"),  # null columns: nothing in it
        ((["0"], [None]), "{", "not_json"),
        ((["0"], [None]), "[]", "lengths_differ"),
        ((["0"], [None]), '{"a": 1}', "lengths_differ"),
        ((["0", None], [None, "a" * 10_000_000]), None, "text_too_long"),
        ((["0"] * 31, [None] * 31), None, "too_many_images"),
        ((["0"], [None]), '[{"nsfw": true}]', "too_few_images"),
    ]
    table = {
        "images": pa.array([i and [x and png(int(x)) for x in i] for (i, _), _, _ in cases], pa.list_(pa.binary())),
        "texts": pa.array([t for (_, t), _, _ in cases], pa.list_(pa.string())),
        "metadata": pa.array([m for _, m, _ in cases], pa.string()),
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet", row_group_size=3)
    pages = Obelics(f"{tmp_path}/a.parquet")
    assert pages.filters == Filters(max_images=30)
    for i, (_, _, reason) in enumerate(cases):
        with pytest.raises(RecordError) as error:
            pages[i]
        assert error.value.reason == reason and str(error.value).startswith(f"{tmp_path}/a.parquet:{i % 3} of row")
    with pytest.raises(RecordError, match="is an address; expected FILES#FOLDER or FILES#TARS"):
        Obelics(str(parquet(tmp_path / "b.parquet", ROWS, url_of := str)))[0] and url_of
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:-10])
    pq.write_table(pa.table({"images": [[b""]], "text": [["a"]]}), tmp_path / "c.parquet")
    for file, message in (("cut", "can't be read"), ("c", "no column texts; expected"), ("none", "no such file")):
        with pytest.raises(DataError, match=message):
            Obelics(f"{tmp_path}/{file}.parquet")
    broken = bytearray((tmp_path / "a.parquet").read_bytes())
    broken[40:200] = bytes(160)  # the footer is whole
    (tmp_path / "broken.parquet").write_bytes(broken)
    with pytest.raises(RecordError, match=r"broken.parquet:0 of row group 0: can't be read"):
        Obelics(f"{tmp_path}/broken.parquet")[0]
