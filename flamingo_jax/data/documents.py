"""Documents: texts with images and clips between them, and what the model gets of one (arXiv 2204.14198 §2.3, 3.1).

Here the masks are made, from φ; the model only obeys them. Dimension letters: see `flamingo_jax/models/layers.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from clip_jax.data.pipeline import Element
from clip_jax.errors import ConfigError, RecordError
from flamingo_jax.data.tokenizer import TextTokenizer

IMAGE_TAG = "<image>"  # plain text to the language model
ATTENDED = ("previous", "next", "all")


@dataclass(frozen=True)
class Media:
    """An image or a clip: uint8 [F, S, S, 3]."""

    frames: np.ndarray


@dataclass(frozen=True)
class Text:
    """A piece of text; `learned` tells whether its tokens, and an end after it, count in the loss."""

    text: str
    learned: bool = True


@dataclass(frozen=True)
class EndOfChunk:
    """The token <EOC>: before every image but one that opens a document, and at the end."""


END = EndOfChunk()
Part = Media | Text | EndOfChunk
M = TypeVar("M")  # media, decoded or not


@dataclass(frozen=True)
class Document:
    """Parts in their order. `attend` is φ: which images a token sees, the last one before it ("previous"),
    the first one after it ("next"), or all before it ("all").
    """

    parts: Sequence[Part]
    attend: str = "previous"

    @property
    def media(self) -> list[Media]:
        return [part for part in self.parts if isinstance(part, Media)]


def interleave(text: str, media: Sequence[Media]) -> Document:
    """A document of a text with `<image>` where an image or clip belongs.

    Raises ConfigError where there are more or fewer of them than places.
    """
    if text.count(IMAGE_TAG) != len(media):
        places = text.count(IMAGE_TAG)
        raise ConfigError(f"{len(media)} images for {places} places {IMAGE_TAG} in the text {text[:60]!r}")
    return Document(with_ends(cut_at_tags(text, media)))


def cut_at_tags(text: str, media: Sequence[M], *, learned: bool = True) -> list[M | Text]:
    """The texts between tags, without blank ones, and the media in place of the tags: as many."""
    first, *rest = text.split(IMAGE_TAG)
    parts: list[M | Text] = [Text(first, learned)] if first.strip() else []
    for image, after in zip(media, rest, strict=True):
        parts += [image, Text(after, learned)] if after.strip() else [image]
    return parts


def with_ends(parts: Sequence[M | Text]) -> list[M | Text | EndOfChunk]:
    """Parts with an end before every image but one that opens the document, and at the end."""
    ended: list[M | Text | EndOfChunk] = []
    for part in parts:
        ended += [END, part] if ended and not isinstance(part, Text) else [part]
    return [*ended, END]


@dataclass(frozen=True)
class Shape:
    """What a batch has room for: T images of F frames of S pixels a side, L tokens."""

    images: int
    frames: int
    image_size: int
    tokens: int


def phi(places: Sequence[int], length: int, attend: str) -> np.ndarray:
    """Which images the tokens of a document attend. [length, len(places)] bool.

    `places`: the positions of the images' tags, ascending. A token that has no such image attends none.
    """
    if attend not in ATTENDED:
        raise ConfigError(f"attend {attend!r}: expected one of {', '.join(ATTENDED)}")
    token, place = np.arange(length)[:, None], np.asarray(places, np.int64)[None, :]
    if attend == "next":
        return (place >= token) & ((place >= token).cumsum(axis=1) == 1)
    before = place <= token
    return before if attend == "all" else before & (before.sum(axis=1, keepdims=True) == np.arange(1, place.size + 1))


def length(parts: Sequence[Part], tokenizer: TextTokenizer) -> int:
    """How many tokens the parts of a document are."""
    texts = [part.text if isinstance(part, Text) else IMAGE_TAG for part in parts if part is not END]
    return sum(len(tokenizer.encode(text)) for text in texts) + sum(part is END for part in parts)


@dataclass(frozen=True)
class Tokens:
    """A document as tokens, after a `bos`: `ids` [L], which of them are learned, and for each image the positions
    (first, one past the last) of its tag.
    """

    ids: list[int]
    learned: list[bool]
    tags: list[tuple[int, int]]


def tokenise(parts: Sequence[object], tokenizer: TextTokenizer, end_id: int) -> Tokens:
    """The tokens of texts, ends, and images, which is what all other parts count as."""
    ids, learned = [tokenizer.bos_id], [False]
    tags: list[tuple[int, int]] = []
    last_learned = False
    for part in parts:
        if isinstance(part, Text):
            new, last_learned = tokenizer.encode(part.text), part.learned
            learned += [last_learned] * len(new)
        elif part is END:
            new = [end_id]
            learned.append(last_learned)
        else:
            new = tokenizer.encode(IMAGE_TAG)
            tags.append((len(ids), len(ids) + len(new)))
            learned += [False] * len(new)
        ids += new
    return Tokens(ids, learned, tags)


def window(tokens: Tokens, length: int, rng: np.random.Generator | None = None) -> tuple[Tokens, list[int]]:
    """(at most `length` tokens of a document, the `bos` among them, which of its images are in them).

    The paper's random window (arXiv 2204.14198), of those that hold a whole image tag where there is
    one; without `rng`, the first. A tag that the window would cut is left out whole.
    """
    room, L = length - 1, len(tokens.ids) - 1
    start, stop = 1, len(tokens.ids)
    if room < L:
        starts = np.zeros(L - room + 1, bool)  # of windows from token 1 + i on
        for first, end in tokens.tags:
            starts[max(0, end - 1 - room) : first] = True
        possible = np.flatnonzero(starts) if starts.any() else np.arange(len(starts))
        start = 1 + int(possible[rng.integers(len(possible))] if rng is not None else 0)
        stop = start + room
    for first, end in tokens.tags:
        start = end if first < start < end else start
        stop = first if first < stop < end else stop
    kept = [i for i, (first, end) in enumerate(tokens.tags) if start <= first and end <= stop]
    tags = [(tokens.tags[i][0] - start + 1, tokens.tags[i][1] - start + 1) for i in kept]
    ids, learned = ([part[0], *part[start:stop]] for part in (tokens.ids, tokens.learned))
    return Tokens(ids, learned, tags), kept


def text_arrays(tokens: Tokens, shape: Shape, attend: str, *, left: bool = False) -> Element:
    """Tokens padded to `shape`, with their masks (see `encode`). Tokens whose image is one too many attend none."""
    L = len(tokens.ids)
    where = slice(shape.tokens - L, None) if left else slice(L)
    text, text_mask, loss_mask = (np.zeros(shape.tokens, kind) for kind in (np.int32, bool, bool))
    media_mask = np.zeros((shape.tokens, shape.images), bool)
    text[where], text_mask[where], loss_mask[where] = tokens.ids, True, tokens.learned
    seen = phi([first for first, _ in tokens.tags], L, attend)[:, : shape.images]
    media_mask[where, : seen.shape[1]] = seen
    return {"text": text, "text_mask": text_mask, "media_mask": media_mask, "loss_mask": loss_mask}


def stack_frames(
    media: Sequence[np.ndarray], shape: Shape, item: Sequence[int], dtype: np.typing.DTypeLike, *, key: str
) -> tuple[np.ndarray, np.ndarray]:
    """(images or clips [F, *item] together, padded with zeros [T, F, *item], frame_mask [T, F]).

    Raises RecordError, naming `key`, for more or larger ones than there is room for.
    """
    if len(media) > shape.images:
        raise RecordError(f"{key}: {len(media)} images; at most {shape.images} expected")
    stacked = np.zeros((shape.images, shape.frames, *item), dtype)
    frame_mask = np.zeros((shape.images, shape.frames), bool)
    for t, frames in enumerate(media):
        if len(frames) > shape.frames or frames.shape[1:] != stacked.shape[2:]:
            raise RecordError(f"{key}: frames {frames.shape}; at most {stacked.shape[1:]} expected")
        stacked[t, : len(frames)], frame_mask[t, : len(frames)] = frames, True
    return stacked, frame_mask


def encode(
    document: Document, tokenizer: TextTokenizer, shape: Shape, end_id: int, *, key: str, left: bool = False
) -> Element:
    """A document as the model's arrays, padded; on the left for generation.

    Returns:
      media uint8 [T, F, S, S, 3], frame_mask bool [T, F], text int32 [L], text_mask bool [L],
      media_mask bool [L, T], loss_mask bool [L] (which tokens are to be predicted).

    Raises:
      RecordError, naming `key`: more images, frames or tokens than `shape` has room for.
    """
    size = shape.image_size
    frames = [part.frames for part in document.media]
    media, frame_mask = stack_frames(frames, shape, (size, size, 3), np.uint8, key=key)
    tokens = tokenise(document.parts, tokenizer, end_id)
    if shape.tokens < len(tokens.ids):
        raise RecordError(f"{key}: {len(tokens.ids)} tokens; at most {shape.tokens} expected")
    return {"media": media, "frame_mask": frame_mask} | text_arrays(tokens, shape, document.attend, left=left)
