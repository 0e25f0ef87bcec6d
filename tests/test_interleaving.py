"""`launch.prepare interleave`: what is written can be trained on, goes on after a kill, and stays in its folder."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_web import document, lines, png, said, tar

from clip_jax.data.sources import SOURCES, Pair
from clip_jax.errors import ConfigError, DataError
from flamingo_jax.data import interleaving
from flamingo_jax.data.interleaving import Job, blocked_words, write_pages, written_spec
from flamingo_jax.data.pages import open_pages
from launch import prepare

TEXT = "A text that is long enough for a page, with a word or two to spare at its very end, I hope so."


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (70, 70, 3), np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    for i in range(7):
        (folder / f"{i}.png").write_bytes(picture(i % 5))  # two of them twice
        before = "" if i % 2 else "<p>First: "
        (folder / f"{i}.html").write_text(f"{before}<img src={i}.png><p>{TEXT} Number {i}.<img src=none.png>")
    (folder / "bad.html").write_text(f"<img src=0.png>{TEXT} Much GORE here.")
    (folder / "none.html").write_text(TEXT)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tars", [False, True])
def test_html_becomes_pages_that_read_the_same(
    site: Path, tmp_path: Path, tars: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "words.txt").write_text("gore\nred\n")
    output = tmp_path / "out"
    more = ["--blocked", str(tmp_path / "words.txt"), "--shard-size", "4"] + ["--tars"] * tars
    prepare.main(["interleave", f"html:{site}", "--output", str(output), *more])
    printed = capsys.readouterr().out
    assert "7 pages with 7 images" in printed and "of 9 read" in printed
    assert "pages left out: 2 (" in printed and "blocked word 1" in printed and "too little text 1" in printed
    assert "images left out: 7 (not there 7)" in printed
    spec = printed.strip().rpartition("source ")[2]
    written, original = open_pages("interleaved", spec), open_pages("interleaved", f"html:{site}")
    assert len(written) == 7
    for i in range(7):
        one, other = written[i], original[i]
        assert [getattr(part, "text", type(part)) for part in one.parts] == [
            getattr(part, "text", type(part)) for part in other.parts
        ]
        assert [raw.read("") for raw in one.media] == [raw.read("") for raw in other.media] == [picture(i % 5)]
    names = [name for name in files(output) if name.startswith("images/")]
    assert len(names) == (0 if tars else 5)  # one content, one file

    before = files(output)
    capsys.readouterr()
    prepare.main(["interleave", f"html:{site}", "--output", str(output), *more, "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert (figures["written"], figures["read"], figures["source"]) == (7, 9, spec)
    assert files(output) == before
    (output / "counts" / "00001.json").unlink()  # as after a kill within the second shard
    (output / "pages-00001.jsonl").write_text("half a li")
    prepare.main(["interleave", f"html:{site}", "--output", str(output), *more])
    assert files(output) == before
    with pytest.raises(SystemExit, match="was begun with shard_size 4, now 1024; expected the same, or another output"):
        prepare.main(["interleave", f"html:{site}", "--output", str(output), *more[:2]])


def test_an_interrupted_shard_leaves_no_trace(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, output = Job(f"html:{site}", shard_size=4, tars=True), tmp_path / "out"
    encoded, calls = interleaving._encoded, []

    def stops(*arguments: object, **named: bool) -> object:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encoded(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(interleaving, "_encoded", stops)
    with pytest.raises(KeyboardInterrupt):
        write_pages(job, output)
    left = {"settings.json", "pages-00000.jsonl", "images-00000.tar", "counts/00000.json"}
    assert set(files(output)) == left
    write_pages(job, output)
    write_pages(job, tmp_path / "at once")
    assert files(output) == files(tmp_path / "at once")


def test_pairs_in_groups_use_every_pair_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair(f"{i}", png(i), f"picture {i}, <image>" if i == 3 else f"picture {i}") for i in range(23)]
    pairs[9] = Pair("9", b"broken", "picture 9")
    monkeypatch.setitem(SOURCES, "made", lambda where: pairs)
    for seed in range(2):
        arguments = ["interleave", "--from-pairs", "made:x", "--images-each", "4", "--seed", str(seed)]
        prepare.main([*arguments, "--output", str(tmp_path / str(seed)), "--shard-size", "2"])
    orders = []
    for seed in range(2):
        written = open_pages("interleaved", written_spec(Job("pairs:made:x"), tmp_path / str(seed)))
        pages = [said(written[i]) for i in range(len(written))]
        order = [int(number) for page in pages for number in page.replace("<", ">").split(">")[1::2]]
        assert Counter(order) == Counter(set(range(23)) - {9})
        for page in pages:  # every caption after its own picture, that of the broken one gone with it
            for part in page.strip("|").split("|"):
                number = part[1:].split(">")[0]
                assert part.rstrip(" ,") == f"<{number}>picture {number}"
        assert sorted(page.count("<") for page in pages) in ([3, 3, 4, 4, 4, 4], [2, 4, 4, 4, 4, 4])
        orders.append(order)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    direct = open_pages("interleaved", "pairs:made:x?images=4&seed=0")
    assert len(direct) == 6 and [len(direct[i].media) for i in range(6)] == [4] * 5 + [3]
    for options, message in (("images=0", "at least 1"), ("images=a", "whole numbers"), ("size=3", "option 'size'")):
        with pytest.raises(DataError, match=message):
            open_pages("interleaved", f"pairs:made:x?{options}")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_published_pages_by_any_number_of_processes(workers: int, tmp_path: Path) -> None:
    tar(tmp_path / "images.tar", {f"{i:012x}.png": png(i) for i in range(20)})
    cases = [[1, 0], [0], [2, 2, 1], [0, 1], [2, 0]]
    (tmp_path / "docs.jsonl").write_bytes(
        lines(*[document(c, 3, 4 * i) for i, c in enumerate(cases)], {"text_list": 3})
    )
    job = Job(f"mmc4:{tmp_path}/docs.jsonl#{tmp_path}/images.tar?min_images=2", shard_size=3)
    counts = write_pages(job, tmp_path / "out", workers)
    assert counts["left_out"] == {"too_few_images": 1, "wrong_type": 1}
    written, source = open_pages("interleaved", written_spec(job, tmp_path / "out")), job.open()
    assert [said(written[i]) for i in range(4)] == [said(source[i]) for i in (0, 2, 3, 4)]


def test_what_can_not_be_written_is_one_line(site: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for output in ("full", "full/mine.txt"):
        with pytest.raises(ConfigError, match="is not empty; expected a new folder"):
            write_pages(Job(f"html:{site}"), tmp_path / output)
    assert files(tmp_path / "full") == {"mine.txt": b"mine"}
    with pytest.raises(SystemExit, match="expected SPEC or --from-pairs SPEC, one of them"):
        prepare.main(["interleave", "--output", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="at least 1 expected"):
        write_pages(Job(f"html:{site}", shard_size=0), tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "found"),
    [("all gore.", True), ("GORE", True), ("Category", False), ("gored", False), ("a bad  thing", False),
     ("a bad thing", True), ("Straße", True)],
)  # fmt: skip
def test_blocked_words_are_whole_words(text: str, found: bool) -> None:
    pattern = blocked_words(["gore", " bad thing", "", "STRASSE"])
    assert pattern is not None and bool(pattern.search(text.casefold())) == found
    assert blocked_words([" "]) is None
