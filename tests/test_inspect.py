"""`launch.prepare inspect`: its page counts what there is, shows what fails, and runs nothing of what it shows."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_html import noise
from test_video import write as write_video
from test_web import document, lines, name, png

from clip_jax.data.sources import SOURCES, Pair
from launch import prepare
from launch.preparing import inspect

HOSTILE = [
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "{{ 7 * 7 }}{% raw %}", "</style><script src=//x>",
    "<!-- <iframe srcdoc='<script>'>", "javascript:alert(1)", "'\"`&lt;script&gt;", "\u202e gnp.tpircs",
]  # fmt: skip


class Tags(HTMLParser):
    """What an independent parser finds in the page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def inspected(tmp_path: Path, *arguments: str) -> Tags:
    prepare.main(["inspect", *arguments, "--output", str(tmp_path / "page.html")])
    return Tags((tmp_path / "page.html").read_text(encoding="utf-8"))


def test_hostile_texts_are_shown_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [Pair(f"{text}.key", noise(70), text) for text in HOSTILE]
    pairs += [Pair(f"bad {text}", text.encode(), "a text") for text in HOSTILE]
    monkeypatch.setitem(SOURCES, "made", lambda where: pairs)
    page = inspected(tmp_path, "made:<script>alert(2)</script>")
    tags = {tag for tag, _ in page.tags}
    assert tags <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "b", "table", "tr", "th",
                    "td", "ul", "li", "small", "img", "span"}  # fmt: skip
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes) and "href" not in attributes
        if tag == "img":
            assert str(attributes["src"]).startswith(("data:image/webp;base64,", "data:image/svg+xml;base64,"))
    for text in HOSTILE:
        assert text in page.text and f"{text}.key" in page.text
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "8of 16 read are sound" in page.text.replace("\n", "") and "50.0 %damaged" in page.text.replace("\n", "")


def test_figures_are_those_of_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    sides = rng.integers(70, 200, (20, 2)).tolist()
    pairs = [Pair(f"{i}", noise(w, h, "jpeg"), "word " * (i + 1)) for i, (w, h) in enumerate(sides)]
    pairs += [Pair("empty", noise(), " "), Pair("twin", pairs[3].image, pairs[3].text)]
    monkeypatch.setitem(SOURCES, "made", lambda where: pairs)
    found = inspect.look("pairs", "made:x", 100, 5, 8, seed=3)
    assert (found.records, found.read, found.sound, len(found.shown)) == (22, 22, 21, 5)
    order = [int(np.flatnonzero([p.text == "word " * w for p in pairs])[0]) for w in found.words]
    assert sorted(order) == sorted([*range(20), 3])
    assert found.widths == [sides[i][0] for i in order] and found.heights == [sides[i][1] for i in order]
    assert found.sizes == [len(pairs[i].image) for i in order]
    assert found.characters == [5 * (i + 1) for i in order]
    assert found.formats == {"JPEG": 21} and dict(found.repeated) == {"images": 1, "texts": 1}
    assert [(r.kind, r.count, r.examples) for r in found.reasons] == [("damaged", 1, ["empty: the text is empty"])]
    rows = dict(inspect.table(found))
    quantiles = np.quantile(found.widths, [0, 0.05, 0.5, 0.95, 1]).round()
    assert rows["image width, pixels"] == [f"{q:.0f}" for q in quantiles]
    few = inspect.look("pairs", "made:x", 7, 5, 8, seed=0), inspect.look("pairs", "made:x", 7, 5, 8, seed=1)
    assert few[0].read == 7 and few[0].widths != few[1].widths


def test_pages_clips_and_what_filters_leave_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(12):
        (tmp_path / name(i)).write_bytes(png(i))
    (tmp_path / name(11)).write_bytes(b"broken")
    records = [document([1, 0], 2), document([0, 20], 2), document([0], 1, first=10), document([0], 1, first=11)]
    (tmp_path / "docs.jsonl").write_bytes(lines(*records, document([0, 0], 1, first=11)))
    page = inspected(tmp_path, f"mmc4:{tmp_path}/docs.jsonl#{tmp_path}?min_images=2")
    printed = capsys.readouterr().out
    assert "5 of 5 records\n1 sound, 1 damaged, 3 left out\n" in printed
    assert "damaged: index out of range 1 (first: " in printed and "left out: too few images 3" in printed
    inspected(tmp_path, f"mmc4:{tmp_path}/docs.jsonl#{tmp_path}?min_images=2", "--json")
    figures = json.loads(capsys.readouterr().out)
    assert (figures["records"], figures["sound"], figures["damaged"], figures["left_out"]) == (5, 1, 1, 3)
    assert [(one["reason"], one["count"]) for one in figures["reasons"] if one["kind"] == "left out"] == [
        ("too_few_images", 3)
    ]
    assert [tag for tag, _ in page.tags].count("img") == 1 + 2  # the histograms, and the only page's
    assert page.text.index("Sentence 0.") < page.text.index("Sentence 1.")

    write_video(tmp_path / "clip.mp4", "libx264", 50)
    (tmp_path / "clips.jsonl").write_text(
        "\n".join(json.dumps({"video": video, "text": "it moves"}) for video in ("clip.mp4", "none.mp4"))
    )
    page = inspected(tmp_path, f"json:{tmp_path}/clips.jsonl", "--kind", "clips", "--frames", "4")
    assert "64×48 MP4" in page.text and "4 frames" in page.text and "can not be read" in page.text
    assert [tag for tag, _ in page.tags].count("img") == 1 + 4
    page = inspected(tmp_path, "emoji:train", "-n", "3", "--shown", "0")
    assert "Samples" not in page.text and [tag for tag, _ in page.tags].count("img") == 1

    for arguments, message in (
        ([f"json:{tmp_path}/clips.jsonl"], "is it clips, interleaved or chats. --kind says it"),
        (["emoji:train", "--kind", "pages"], "data of kind 'pages': expected one of"),
        (["other:x"], "data source 'other:x': expected KIND:WHERE"),
        (["emoji:train", "-n", "0"], "at least one record"),
        (["emoji:train", "--output", f"{tmp_path}/none/page.html"], "none: no such folder"),
    ):
        with pytest.raises(SystemExit, match=message):
            prepare.main(["inspect", "--output", str(tmp_path / "other.html"), *arguments])
    assert not (tmp_path / "other.html").exists()


def test_where_nothing_is_sound_the_page_says_why(tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl").write_bytes(b"{{\n[]\n" + lines({"text": 3}))
    page = inspected(tmp_path, f"json:{tmp_path}/docs.jsonl", "--kind", "interleaved")
    assert "100.0 %" in page.text and "Figures" not in page.text
    for reason in ("not json", "not a json object", "wrong type"):
        assert reason in page.text
