"""Plain texts to train a language model on: random access to strings, `len(texts)` and `texts[i]`.

Texts are named by `KIND:WHERE`, as pairs are; `open_texts` opens them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, SupportsIndex

from clip_jax.data.sources import TfdsRecords, open_source
from clip_jax.errors import DataError
from flamingo_jax.data.emoji import PromptTexts
from flamingo_jax.data.tokenizer import ASSETS


class TextSource(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: SupportsIndex) -> str: ...


class TfdsTexts:
    """The feature `text` of a split of a TFDS data set. Raises as TfdsRecords does."""

    def __init__(self, directory: str | Path, split: str):
        self._records = TfdsRecords(directory, split, (("text",),))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> str:
        return self._records[index]["text"].decode("utf-8", errors="replace")


def _open_tfds(where: str) -> TextSource:
    directory, _, split = where.rpartition("#")
    if not directory:
        raise DataError(f"tfds:{where}: expected tfds:DIRECTORY#SPLIT")
    return TfdsTexts(directory, split)


def _open_wordnet(split: str) -> TextSource:
    return TfdsTexts(ASSETS / "wordnet" / "1.0.0", split)


def _open_prompts(where: str) -> TextSource:
    return PromptTexts(open_source(where))


TEXTS: dict[str, Callable[[str], TextSource]] = {
    "tfds": _open_tfds,
    "wordnet": _open_wordnet,
    "prompts": _open_prompts,
}


def open_texts(spec: str) -> TextSource:
    """Opens `wordnet:SPLIT` (embedded: pages of dictionary entries), `tfds:DIRECTORY#SPLIT`, or `prompts:SOURCE`
    (pages of questions about the pictures of a source of pairs, answered blindly).

    Raises DataError for an unknown kind, for what the kind itself refuses, and where there is no text.
    """
    kind, _, where = spec.partition(":")
    if kind not in TEXTS or not where:
        raise DataError(f"texts {spec!r}: expected KIND:WHERE with KIND one of {', '.join(TEXTS)}")
    texts = TEXTS[kind](where)
    if len(texts) == 0:
        raise DataError(f"texts {spec!r} are empty: expected at least one")
    return texts
