"""What Flamingo can be trained on: pairs, clips, interleaved pages and chats, as texts and media not yet decoded.

`open_pages(kind, spec)` opens a data set of a kind: random access to pages, `len(pages)` and `pages[i]`. To add a
format (MMC4, OBELICS), write a class with `__len__` and `__getitem__` and enter it in `PAGES`.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from clip_jax.data import transforms
from clip_jax.data.pipeline import check_named
from clip_jax.data.sources import SOURCES, open_source
from clip_jax.errors import ConfigError, DataError, RecordError
from flamingo_jax.data.documents import END, IMAGE_TAG, EndOfChunk, Text, cut_at_tags, with_ends
from flamingo_jax.data.json_records import JsonRecords
from flamingo_jax.data.prompts import question
from flamingo_jax.data.video import VIDEO_SUFFIXES, read_frames

R = TypeVar("R")
ROLES = {"user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}  # the latter are LLaVA's


@dataclass(frozen=True)
class Raw:
    """An image, still encoded, or the file of an image or clip."""

    where: bytes | Path


@dataclass(frozen=True)
class Page:
    """A document whose media are not decoded yet."""

    key: str
    parts: Sequence[Raw | Text | EndOfChunk]

    @property
    def media(self) -> list[Raw]:
        return [part for part in self.parts if isinstance(part, Raw)]


class PageSource(Protocol):
    """`pages[i]` raises RecordError, which names the record, for one that can't be used."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Page: ...


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


@dataclass(frozen=True)
class JsonPages:
    """Records of a file of JSON, each read by `read(record, key, folder)`.

    Images and clips are named by paths from `folder`, by default the file's own: FILE or FILE#FOLDER.
    """

    read: Callable[[Mapping[str, Any], str, Path], Page]
    records: JsonRecords
    folder: Path

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Page:
        key, record = self.records[index]
        return self.read(record, key, self.folder)


def open_json(where: str, read: Callable[[Mapping[str, Any], str, Path], Page]) -> JsonPages:
    file, _, folder = where.partition("#")
    return JsonPages(read, JsonRecords(Path(file)), Path(folder) if folder else Path(file).parent)


def interleaved_page(record: Mapping[str, Any], key: str, folder: Path) -> Page:
    """{"text": "A cat<image> and<image> a dog", "images": ["cat.jpg", "dog.gif"]}: any number of images and clips."""
    text, media = _field(record, "text", str, key), _media(record, key, folder)
    return Page(key, with_ends(_cut(text, media, key)))


def clip_page(record: Mapping[str, Any], key: str, folder: Path) -> Page:
    """{"video": "dog.mp4", "text": "a dog runs"}."""
    text = _field(record, "text", str, key)
    if not text.strip():
        raise RecordError(f"{key}: the text is empty")
    return Page(key, with_ends([Raw(folder / _field(record, "video", str, key)), Text(text)]))


def chat_page(record: Mapping[str, Any], key: str, folder: Path) -> Page:
    """{"images": ["cat.jpg"], "conversation": [{"user": "What is <image>?"}, {"assistant": "a cat"}, …]}, or LLaVA's
    {"image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", …}]}.

    Only answers, and the end after each, are learned. Images without a tag stand before the first turn, as do those
    whose tag opens or closes a question before that question.
    """
    turns, media = _turns(record, key), _media(record, key, folder)
    tags = sum(text.count(IMAGE_TAG) for _, text in turns)
    if tags == 0 and media:
        turns[0] = turns[0][0], IMAGE_TAG * len(media) + turns[0][1]
    elif tags != len(media):
        raise RecordError(f"{key}: {len(media)} images for {tags} places {IMAGE_TAG}")
    parts: list[Raw | Text | EndOfChunk] = []
    for role, text in turns:
        if role == "assistant":
            if IMAGE_TAG in text:
                raise RecordError(f"{key}: {IMAGE_TAG} in an answer; expected in questions only")
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
    "pairs": {kind: partial(lambda kind, where: PairPages(f"{kind}:{where}"), kind) for kind in SOURCES},
    "clips": {"json": partial(open_json, read=clip_page)},
    "interleaved": {"json": partial(open_json, read=interleaved_page)},
    "chats": {"json": partial(open_json, read=chat_page)},
}


def open_pages(kind: str, spec: str) -> PageSource:
    """Opens a data set of a kind: `pairs` by any name that `clip_jax.data.sources.open_source` knows; `clips`,
    `interleaved` and `chats` by `json:FILE` or `json:FILE#FOLDER` (see `clip_page`, `interleaved_page`, `chat_page`).

    Raises ConfigError for an unknown kind, DataError for an unknown format and for what the format itself refuses.
    """
    if kind not in PAGES:
        near = difflib.get_close_matches(kind, PAGES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"data of kind {kind!r}: expected one of {', '.join(PAGES)}; did you mean {near}?")
    name, _, where = spec.partition(":")
    if name not in PAGES[kind] or not where:
        raise DataError(f"{kind} {spec!r}: expected KIND:WHERE with KIND one of {', '.join(PAGES[kind])}")
    return PAGES[kind][name](where)


def decode(raw: Raw, frames: int, key: str) -> list[Image.Image]:
    """The image, or as many frames of the clip, as RGB: of a video at 1 a second, of an animated image evenly spaced.

    Raises RecordError, naming the file or `key`, for what does not decode.
    """
    if isinstance(raw.where, bytes):
        return [transforms.decode(raw.where, key)]
    key = str(raw.where)
    if raw.where.suffix.lower() in VIDEO_SUFFIXES:
        return read_frames(raw.where, frames)
    try:
        data = raw.where.read_bytes()
    except OSError as error:
        raise RecordError(f"{key}: can't be read ({error.strerror})") from None
    return transforms.decode_frames(data, frames, key)


def _field(record: Mapping[str, Any], name: str, kind: type[R], key: str) -> R:
    value = record.get(name)
    if not isinstance(value, kind):
        found = f"{name} is {value!r}"[:80] if name in record else f"no {name}"
        raise RecordError(f"{key}: {found}; expected {kind.__name__} {name}")
    return value


def _media(record: Mapping[str, Any], key: str, folder: Path) -> list[Raw]:
    """The media of the field `images`, or of `image`, which may be one name or a list of them, too."""
    names = record.get("images", record.get("image")) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecordError(f"{key}: images is {names!r:.60}; expected a list of file names")
    return [Raw(folder / name) for name in names]


def _cut(text: str, media: Sequence[Raw], key: str, *, learned: bool = True) -> list[Raw | Text]:
    if text.count(IMAGE_TAG) != len(media):
        raise RecordError(f"{key}: {len(media)} images for {text.count(IMAGE_TAG)} places {IMAGE_TAG}")
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
            raise RecordError(f'{key}: turn {turn!r:.60}; expected {{"user": …}} or {{"from": "human", "value": …}}')
        if role not in ROLES or not isinstance(text, str):
            raise RecordError(f"{key}: a turn of {role!r}; expected a text of one of {', '.join(ROLES)}")
        turns.append((ROLES[role], text))
    if not turns or turns[0][0] != "user" or all(role != "assistant" or not text.strip() for role, text in turns):
        raise RecordError(f"{key}: expected a question first, and an answer")
    return turns
