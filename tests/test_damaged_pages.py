"""Over 1,500 damaged records of every kind of page: each is a page, or one line with a reason; never anything else."""

import copy
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pages import LLAVA, OURS
from test_web import document, lines, name, png, tar

from clip_jax.errors import RecordError
from flamingo_jax.data.media import MAX_CHARACTERS, Page, decode
from flamingo_jax.data.pages import open_pages

JUNK: list[Any] = [
    None, True, -1, 0, 10**40, 0.5, float("nan"), float("inf"), "", "a\0b", "\ud800", "../../x", "x" * 70_000,
    "<image>" * 3, [], [[]], [None], {}, {"a": {}}, ["a", 1], [-1] * 100,
]  # fmt: skip
RECORDS: dict[str, Any] = {
    "mmc4": document([1, 0, 2], 3),
    "interleaved": {"text": "A cat<image> and<image> a dog", "images": [name(1), name(2)]},
    "clips": {"video": name(1), "text": "a dog runs"},
    "chats": OURS,
    "llava": LLAVA,
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value within a record, its own but the record's."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


def damaged(record: Any) -> Iterator[Any]:
    """The record with each value in it missing, doubled, or any of JUNK."""
    for path in places(record):
        for junk in (*JUNK, "missing", "doubled"):
            changed = copy.deepcopy(record)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if junk == "missing":
                del inner[path[-1]]
            elif junk == "doubled" and isinstance(inner, list):
                inner.append(inner[path[-1]])
            else:
                inner[path[-1]] = junk
            yield changed


@pytest.mark.parametrize("case", RECORDS)
def test_every_damage_is_a_page_or_one_line(case: str, tmp_path: Path) -> None:
    tar(tmp_path / "images.tar", {**{name(i): png(i) for i in range(4)}, "red.png": png(5)})
    records = list(damaged(RECORDS[case]))
    (tmp_path / "data.jsonl").write_bytes(lines(*records))
    kind = {"mmc4": "interleaved", "llava": "chats"}.get(case, case)
    options = "?min_images=0&min_similarity=0.1" if case == "mmc4" else ""
    scheme = "mmc4" if case == "mmc4" else "json"
    pages = open_pages(kind, f"{scheme}:{tmp_path}/data.jsonl#{tmp_path}/images.tar{options}")
    assert len(pages) == len(records)
    outcomes: Counter[str] = Counter()
    for i in range(len(pages)):
        try:
            page = pages[i]
            assert isinstance(page, Page)
            for raw in page.media:
                decode(raw, 2, page.key)
            outcomes["page"] += 1
        except RecordError as error:
            assert "\n" not in str(error) and len(str(error)) < 600 and error.reason != "other"
            outcomes[error.reason] += 1
    assert len(outcomes) >= 3 and sum(outcomes.values()) - outcomes["page"] > 40


@pytest.mark.parametrize("kind", ["interleaved", "clips", "chats"])
def test_texts_that_are_too_long_or_no_unicode(kind: str, tmp_path: Path) -> None:
    def record(text: str) -> Any:
        chat = [{"user": "what?"}, {"assistant": text}]
        return {"video": "a.png", "images": [], "text": text, "conversation": chat}

    texts = ["a" * 10_000_000, "a" * (MAX_CHARACTERS + 1), "a" * (MAX_CHARACTERS - 50), "half \ud83d"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record(text)) + "\n" for text in texts))
    pages = open_pages(kind, f"json:{tmp_path}/data.jsonl")
    for i, reason in enumerate(("text_too_long", "text_too_long", "", "text_not_unicode")):
        if reason:
            with pytest.raises(RecordError) as error:
                pages[i]
            assert error.value.reason == reason
    assert pages[2]


def test_json_pages_in_several_packed_shards_with_images_in_tars(tmp_path: Path) -> None:
    import gzip

    tar(tmp_path / "a.tar", {f"sub/{name(i)}": png(i) for i in range(3)})
    tar(tmp_path / "b.tar", {name(i): png(i) for i in range(3, 6)})
    for shard in range(3):
        records = [{"text": f"{i}<image>", "images": [name(i)]} for i in (2 * shard, 2 * shard + 1)]
        (tmp_path / f"pages-{shard}.jsonl.gz").write_bytes(gzip.compress(lines(*records)))
    pages = open_pages("interleaved", f"json:{tmp_path}/pages-{{0..2}}.jsonl.gz#{tmp_path}/{{a,b}}.tar")
    order = np.random.default_rng(0).permutation(6).tolist()
    for i in order:
        (raw,) = pages[i].media
        (image,) = decode(raw, 1, "")
        assert pages[i].parts[0].text == f"{i}" and np.asarray(image)[0, 0, 0] == 6 * i  # type: ignore[union-attr]
    (tmp_path / "c.jsonl").write_bytes(lines({"text": "<image>", "images": ["none.png"]}))
    with pytest.raises(RecordError, match=r"c.jsonl:1: none.png is not in .*/b.tar"):
        open_pages("interleaved", f"json:{tmp_path}/c.jsonl#{tmp_path}/b.tar")[0]
