"""What Flamingo can be trained on: pairs, clips, interleaved pages and chats, as texts and media not yet decoded.

`open_pages(kind, spec)` opens a data set of a kind: random access to pages, `len(pages)` and `pages[i]`. To add a
format, write a class with `__len__` and `__getitem__` and enter it in `PAGES`.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from clip_jax.data.order import permute
from clip_jax.data.pipeline import check_named
from clip_jax.data.sources import open_source
from clip_jax.data.sources.storage import is_remote
from clip_jax.errors import ConfigError, DataError, RecordError
from flamingo_jax.data.documents import END, IMAGE_TAG, EndOfChunk, Text, cut_at_tags, with_ends
from flamingo_jax.data.filters import Refilled, cut_options
from flamingo_jax.data.html import HtmlPages
from flamingo_jax.data.json_records import JsonRecords
from flamingo_jax.data.media import Page, PageSource, Raw, decode
from flamingo_jax.data.prompts import question
from flamingo_jax.data.shards import ImageStore, JsonShards
from flamingo_jax.data.web import Mmc4, Obelics, plain

__all__ = ["PAGES", "Page", "PageSource", "Raw", "decode", "open_pages"]

R = TypeVar("R")
Find = Callable[[str, str], Raw]  # (name, key of its record) → an image or clip
ROLES = {"user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}  # the latter are LLaVA's


class PairPages:
    """Images with their texts: any source of `clip_jax.data.sources`."""

    def __init__(self, spec: str):
        self._pairs = open_source(spec)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Page:
        pair = self._pairs[index]
        check_named(pair)
        return Page(pair.key, with_ends([Raw(pair.image), Text(pair.text)]))


class GroupedPairs:
    """Pages of `images` pairs each, which a keyed permutation brings together: `pairs:SPEC?images=4&seed=0`.

    For those who have no pages. SPEC is any source of `clip_jax.data.sources`; the last page may have fewer.
    """

    def __init__(self, spec: str):
        where, _, _ = spec.partition("?")
        _, _, options = cut_options(spec.replace("#", ""))
        if unknown := options.keys() - {"images", "seed"}:
            raise DataError(f"pairs:{spec}: option {min(unknown)!r}: expected images or seed")
        try:
            self._images, self._seed = int(options.get("images", 4)), int(options.get("seed", 0))
        except ValueError:
            raise DataError(f"pairs:{spec}: expected whole numbers of images and seed") from None
        if self._images < 1:
            raise DataError(f"pairs:{spec}: images={self._images}; at least 1 expected")
        self._pairs = open_source(where)

    def __len__(self) -> int:
        return -(-len(self._pairs) // self._images)

    def __getitem__(self, index: int) -> Page:
        if not 0 <= index < len(self):
            raise IndexError(index)
        count = len(self._pairs)
        parts: list[Raw | Text] = []
        keys = []
        for place in range(index * self._images, min((index + 1) * self._images, count)):
            pair = self._pairs[permute(place, count, self._seed)]
            check_named(pair)
            parts += [Raw(pair.image), Text(plain(pair.text))]
            keys.append(pair.key)
        return Page(" + ".join(keys), with_ends(parts))


@dataclass(frozen=True)
class JsonPages:
    """Records of JSON, each read by `read(record, key, find)`."""

    read: Callable[[Mapping[str, Any], str, Find], Page]
    records: JsonRecords | JsonShards
    find: Find

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Page:
        key, record = self.records[index][:2]
        return self.read(record, key, self.find)


def open_json(where: str, read: Callable[[Mapping[str, Any], str, Find], Page]) -> JsonPages:
    """FILE, FILE#FOLDER or FILE#TARS: images and clips are named by paths from the folder, by default the file's own,
    or by names in tars. Several files of lines, packed ones too: `pages_{0..9}.jsonl.gz`. Lines and tars, not folders,
    may lie in a bucket.
    """
    file, _, images = where.partition("#")
    several = any(c in file for c in "{*") or file.endswith((".gz", ".zip")) or is_remote(file)
    records = JsonShards(file) if several else JsonRecords(Path(file))
    if "{" in images or "*" in images or images.endswith(".tar"):
        return JsonPages(read, records, partial(_in_tars, ImageStore(images), images))
    if is_remote(images or file):
        raise DataError(f"{where}: no tars; images in a bucket are expected in tars, as {file}#{{0..9}}.tar")
    folder = Path(images) if images else Path(file).parent
    return JsonPages(read, records, lambda name, key: Raw(folder / name))


def _in_tars(store: ImageStore, where: str, name: str, key: str) -> Raw:
    found = store.find(name)
    if found is None:
        raise RecordError(f"{key}: {name[:200]} is not in {where}", reason="image_not_there")
    return Raw(found)


def interleaved_page(record: Mapping[str, Any], key: str, find: Find) -> Page:
    """{"text": "A cat<image> and<image> a dog", "images": ["cat.jpg", "dog.gif"]}: any number of images and clips."""
    text, media = _field(record, "text", str, key), _media(record, key, find)
    return Page(key, with_ends(_cut(text, media, key)))


def clip_page(record: Mapping[str, Any], key: str, find: Find) -> Page:
    """{"video": "dog.mp4", "text": "a dog runs"}."""
    text = _field(record, "text", str, key)
    if not text.strip():
        raise RecordError(f"{key}: the text is empty", reason="no_text")
    return Page(key, with_ends([find(_field(record, "video", str, key), key), Text(text)]))


def chat_page(record: Mapping[str, Any], key: str, find: Find) -> Page:
    """{"images": ["cat.jpg"], "conversation": [{"user": "What is <image>?"}, {"assistant": "a cat"}, …]}, or LLaVA's
    {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", …}]}.

    Only answers, and the end after each, are learned. Images without a tag stand before the first turn, as do those
    whose tag opens or closes a question before that question.
    """
    turns, media = _turns(record, key), _media(record, key, find)
    tags = sum(text.count(IMAGE_TAG) for _, text in turns)
    if tags == 0 and media:
        turns[0] = turns[0][0], IMAGE_TAG * len(media) + turns[0][1]
    elif tags != len(media):
        raise RecordError(
            f"{key}: {len(media)} images for {tags} places {IMAGE_TAG}", reason="images_and_places_differ"
        )
    parts: list[Raw | Text | EndOfChunk] = []
    for role, text in turns:
        if role == "assistant":
            if IMAGE_TAG in text:
                raise RecordError(f"{key}: {IMAGE_TAG} in an answer; expected in questions only", reason="no_chat")
            parts += [Text(" " + text.strip()), END]
            continue
        words, before = _tags_first(text.strip())
        text = before + question(words)
        parts += _cut(text, media[: text.count(IMAGE_TAG)], key, learned=False)
        media = media[text.count(IMAGE_TAG) :]
    return Page(key, parts)


def _tags_first(words: str) -> tuple[str, str]:
    """(a question, the tags that open it and those that close it, unless there are others between)."""
    opening, closing = 0, 0
    while words.startswith(IMAGE_TAG):
        words, opening = words.removeprefix(IMAGE_TAG).lstrip(), opening + 1
    rest = words
    while rest.endswith(IMAGE_TAG):
        rest, closing = rest.removesuffix(IMAGE_TAG).rstrip(), closing + 1
    return (words, IMAGE_TAG * opening) if IMAGE_TAG in rest else (rest, IMAGE_TAG * (opening + closing))


PAGES: dict[str, dict[str, Callable[[str], PageSource]]] = {
    "pairs": {},  # all that `open_source` opens, what was entered in SOURCES later, too
    "clips": {"json": partial(open_json, read=clip_page)},
    "interleaved": {
        "json": partial(open_json, read=interleaved_page),
        "mmc4": lambda where: Refilled(Mmc4(where)),
        "obelics": lambda where: Refilled(Obelics(where)),
        "html": lambda where: Refilled(HtmlPages(where)),
        "pairs": GroupedPairs,
    },
    "chats": {"json": partial(open_json, read=chat_page)},
}


def open_pages(kind: str, spec: str) -> PageSource:
    """Opens a data set of a kind: `pairs` by any name that `clip_jax.data.sources.open_source` knows; `clips`,
    `interleaved` and `chats` by `json:FILE` or `json:FILE#IMAGES` (see `open_json`, `clip_page`, `interleaved_page`,
    `chat_page`); `interleaved` also by `mmc4:` (`web.Mmc4`), `obelics:` (`web.Obelics`), `html:` (`html.HtmlPages`)
    and `pairs:` (`GroupedPairs`).

    Raises ConfigError for an unknown kind, DataError for an unknown format and for what the format itself refuses.
    """
    if kind not in PAGES:
        near = difflib.get_close_matches(kind, PAGES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"data of kind {kind!r}: expected one of {', '.join(PAGES)}; did you mean {near}?")
    if kind == "pairs":
        return PairPages(spec)
    name, _, where = spec.partition(":")
    if name not in PAGES[kind] or not where:
        raise DataError(f"{kind} {spec!r}: expected KIND:WHERE with KIND one of {', '.join(PAGES[kind])}")
    return PAGES[kind][name](where)


def _field(record: Mapping[str, Any], name: str, kind: type[R], key: str) -> R:
    value = record.get(name)
    if not isinstance(value, kind):
        found = f"{name} is {value!r}"[:80] if name in record else f"no {name}"
        raise RecordError(
            f"{key}: {found}; expected {kind.__name__} {name}", reason="wrong_type" if name in record else "no_field"
        )
    return value


def _media(record: Mapping[str, Any], key: str, find: Find) -> list[Raw]:
    """The media of the field `images`, or of `image`, which may be one name or a list of them, too."""
    names = record.get("images", record.get("image")) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecordError(f"{key}: images is {names!r:.60}; expected a list of file names", reason="wrong_type")
    return [find(name, key) for name in names]


def _cut(text: str, media: Sequence[Raw], key: str, *, learned: bool = True) -> list[Raw | Text]:
    if text.count(IMAGE_TAG) != len(media):
        raise RecordError(
            f"{key}: {len(media)} images for {text.count(IMAGE_TAG)} places {IMAGE_TAG}",
            reason="images_and_places_differ",
        )
    return cut_at_tags(text, media, learned=learned)


def _turns(record: Mapping[str, Any], key: str) -> list[tuple[str, str]]:
    """(role, text) of each turn. Raises RecordError where there is none to learn from, or an unknown one."""
    name = "conversations" if "conversations" in record else "conversation"
    turns = []
    for turn in _field(record, name, list, key):
        if isinstance(turn, dict) and {"from", "value"} <= turn.keys():
            role, text = turn["from"], turn["value"]
        elif isinstance(turn, dict) and len(turn) == 1:
            ((role, text),) = turn.items()
        else:
            raise RecordError(
                f'{key}: turn {turn!r:.60}; expected {{"user": …}} or {{"from": "human", "value": …}}', reason="no_chat"
            )
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise RecordError(
                f"{key}: a turn of {role!r:.60}; expected a text of one of {', '.join(ROLES)}", reason="no_chat"
            )
        turns.append((ROLES[role], text))
    if not turns or turns[0][0] != "user" or all(role != "assistant" or not text.strip() for role, text in turns):
        raise RecordError(f"{key}: expected a question first, and an answer", reason="no_chat")
    return turns
