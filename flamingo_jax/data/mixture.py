"""The data sets that a Flamingo is trained on, each a stream of documents as the model's arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np

from clip_jax.data import transforms
from clip_jax.data.order import Order, generator
from clip_jax.data.pipeline import Element, Picture, Stream, draw
from clip_jax.data.sources import PairSource, open_source
from clip_jax.errors import ConfigError, RecordError
from flamingo_jax.data.documents import Shape, Text, stack_frames, text_arrays, tokenise, window
from flamingo_jax.data.emoji import Catalogue, EmojiDocuments, catalogue
from flamingo_jax.data.features import Features
from flamingo_jax.data.pages import PAGES, PageSource, Raw, decode, open_pages
from flamingo_jax.data.tokenizer import TextTokenizer

KINDS = ("emoji", *PAGES)
FIELDS = {"kind", "source", "features", "images", "frames", "tokens", "batch_size", "weight"}


@dataclass(frozen=True)
class PageElements:
    """The page at a position, as the model's arrays (see `flamingo_jax.data.documents.encode`), with `rejected`.

    Of a page with more tokens than there is room for, a random window or, where `random_window` is off, the first
    tokens; of more images the first ones of the window. Only what is left is decoded.

    next_rate: how often texts attend the image after them instead of `attend` (p_next of the paper).
    space_rate: how often a page's learned texts begin with a space.
    features: the tower's, instead of pixels: the array is then `features` [T, F, N, C], not `media`.
    """

    source: PageSource
    order: Order
    tokenizer: TextTokenizer
    shape: Shape
    end_id: int
    augment: transforms.Augmentation
    random_window: bool = False
    attend: str = "previous"
    next_rate: float = 0.0
    space_rate: float = 0.0
    features: Features | None = None

    def __call__(self, position: int) -> Element:
        element, rejected = draw(self.order, position, self._element, kind=5, source=self.source)
        return element | {"rejected": np.array(rejected, np.int32)}

    def _element(self, index: int, rng: np.random.Generator) -> Element:
        page, shape = self.source[index], self.shape
        parts = list(page.parts)
        if rng.random() < self.space_rate:
            parts = [with_space(part) if isinstance(part, Text) and part.learned else part for part in parts]
        attend = "next" if rng.random() < self.next_rate else self.attend
        whole = tokenise(parts, self.tokenizer, self.end_id)
        tokens, kept = window(whole, shape.tokens, rng if self.random_window else None)
        if not any(tokens.learned):
            raise RecordError(
                f"{page.key}: nothing to learn in {len(tokens.ids)} of its {len(whole.ids)} tokens",
                reason="nothing_to_learn",
            )
        kept = kept[: shape.images]
        if self.features is None:
            name, item, dtype = "media", (shape.image_size, shape.image_size, 3), np.dtype(np.uint8)
            media = [self._frames(page.media[i], page.key, int(rng.integers(1 << 62))) for i in kept]
        else:
            name, item, dtype = "features", self.features.item, self.features.dtype
            seen = self.features[index]
            if len(seen) != len(page.media):
                raise RecordError(f"{page.key}: {len(page.media)} images, and features of {len(seen)}")
            media = [seen[i][: shape.frames] for i in kept]
        stacked, frame_mask = stack_frames(media, shape, item, dtype, key=page.key)
        return {name: stacked, "frame_mask": frame_mask} | text_arrays(tokens, shape, attend)

    def _frames(self, raw: Raw, key: str, seed: int) -> np.ndarray:
        """uint8 [F, S, S, 3]; the frames of a clip are all changed alike."""
        size = self.shape.image_size
        frames: Sequence[Picture]
        if isinstance(raw.where, bytes):
            frames = [transforms.open_image(raw.where, key)]
        else:
            frames = decode(raw, self.shape.frames, key)
        return np.stack([transforms.training_image(frame, size, self.augment, generator(seed)) for frame in frames])


def with_space(text: Text) -> Text:
    return text if text.text[:1].isspace() else replace(text, text=" " + text.text)


@dataclass
class Mixture:
    """Opens the streams of a config's `data.mixture`: name → kind, source, features, shape, batch size, weight.

    A kind is `emoji` (documents made of the pictures of `data.train`: "pages", "pairs" or "clips", by the stream's
    name) or one of `flamingo_jax.data.pages.PAGES`.

    Raises ConfigError for a field that is missing or unknown and for a kind that does not exist, DataError where data
    are missing.
    """

    config: ml_collections.ConfigDict
    tokenizer: TextTokenizer
    image_size: int
    end_id: int

    @cached_property
    def streams(self) -> dict[str, Stream]:
        return {
            name: Stream(self._elements(name, dict(part), self.config.seed + number), part.batch_size, part.weight)
            for number, (name, part) in enumerate(self.config.data.mixture.items())
        }

    def features(self) -> dict[str, Features]:
        """The cached features that there are, by stream."""
        parts = self.config.data.mixture.items()
        return {name: Features(Path(part.features)) for name, part in parts if part.get("features")}

    def source(self, name: str) -> PageSource:
        """The pages of a stream. Raises ConfigError where there is no such stream, or one made of emoji."""
        mixture = self.config.data.mixture
        if name not in mixture or mixture[name].get("kind", "emoji") == "emoji":
            of_pages = [key for key, part in mixture.items() if part.get("kind", "emoji") != "emoji"]
            raise ConfigError(f"no stream {name!r} of pages in data.mixture; there are {', '.join(of_pages) or 'none'}")
        return open_pages(mixture[name].kind, mixture[name].source)

    @cached_property
    def _emoji(self) -> tuple[PairSource, Catalogue]:
        source = open_source(self.config.data.train)
        return source, catalogue(source, self.image_size)  # decodes every picture, once for all streams

    def _elements(self, name: str, part: Mapping[str, Any], seed: int) -> EmojiDocuments | PageElements:
        part = {"kind": "emoji", "source": "", "features": ""} | dict(part)
        if wrong := sorted(FIELDS ^ set(part)):
            raise ConfigError(f"data.mixture.{name}: {wrong[0]}; expected the fields {', '.join(sorted(FIELDS))}")
        if part["kind"] not in KINDS:
            raise ConfigError(f"data.mixture.{name}.kind {part['kind']!r}: expected one of {', '.join(KINDS)}")
        data, kind = self.config.data, part["kind"]
        shape = Shape(part["images"], part["frames"], self.image_size, part["tokens"])
        augment = transforms.Augmentation(**data.augment)
        if kind == "emoji":
            source, listing = self._emoji
            return EmojiDocuments(
                kind=name,
                source=source,
                seed=seed,
                tokenizer=self.tokenizer,
                shape=shape,
                end_id=self.end_id,
                augment=augment,
                next_rate=data.next_rate,
                listing=listing,
            )
        pages = self.source(name)
        interleaved = kind == "interleaved"
        return PageElements(
            source=pages,
            order=Order(len(pages), seed),
            tokenizer=self.tokenizer,
            shape=shape,
            end_id=self.end_id,
            augment=augment,
            random_window=interleaved,
            attend=data.attend,
            next_rate=data.next_rate if interleaved else 0.0,
            space_rate=0.0 if kind == "chats" else data.space_rate,
            features=self.features().get(name),
        )
