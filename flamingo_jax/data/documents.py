"""Documents: texts with images and clips between them, and what the model gets of one (arXiv 2204.14198 §2.3, 3.1).

Here the masks are made, from φ; the model only obeys them. Dimension letters: see `flamingo_jax/models/layers.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    first, *rest = text.split(IMAGE_TAG)
    if len(rest) != len(media):
        raise ConfigError(f"{len(media)} images for {len(rest)} places {IMAGE_TAG} in the text {text[:60]!r}")
    parts: list[Part] = [Text(first)] if first.strip() else []
    for image, after in zip(media, rest, strict=True):
        parts += [END] if parts else []
        parts += [image, Text(after)] if after.strip() else [image]
    return Document([*parts, END])


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
    ids, learned, places = [tokenizer.bos_id], [False], []
    media = np.zeros((shape.images, shape.frames, shape.image_size, shape.image_size, 3), np.uint8)
    frame_mask = np.zeros((shape.images, shape.frames), bool)
    last_learned = False
    for part in document.parts:
        if isinstance(part, Media):
            t, frames = len(places), len(part.frames)
            if t == shape.images:
                raise RecordError(f"{key}: {len(document.media)} images; at most {shape.images} expected")
            if frames > shape.frames or part.frames.shape[1:] != media.shape[2:]:
                raise RecordError(f"{key}: frames {part.frames.shape}; at most {media.shape[1:]} expected")
            media[t, :frames], frame_mask[t, :frames] = part.frames, True
            places.append(len(ids))
            new = tokenizer.encode(IMAGE_TAG)
            learned += [False] * len(new)
        elif isinstance(part, Text):
            new, last_learned = tokenizer.encode(part.text), part.learned
            learned += [last_learned] * len(new)
        else:
            new = [end_id]
            learned.append(last_learned)
        ids += new
    length = len(ids)
    if length > shape.tokens:
        raise RecordError(f"{key}: {length} tokens; at most {shape.tokens} expected")

    where = slice(shape.tokens - length, None) if left else slice(length)
    text, text_mask, loss_mask = (np.zeros(shape.tokens, kind) for kind in (np.int32, bool, bool))
    media_mask = np.zeros((shape.tokens, shape.images), bool)
    text[where], text_mask[where], loss_mask[where] = ids, True, learned
    media_mask[where, : len(places)] = phi(places, length, document.attend)
    return {
        "media": media,
        "frame_mask": frame_mask,
        "text": text,
        "text_mask": text_mask,
        "media_mask": media_mask,
        "loss_mask": loss_mask,
    }
