"""Documents of pictures that have a name: pages of several, single pairs, and short clips.

Each is a pure function of a position. A page holds captions, or questions of one task, so that later ones can be
told from earlier ones; a clip is made of one picture that moves, and its text says how.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import SupportsIndex

import numpy as np
from PIL import Image

from clip_jax.data import transforms
from clip_jax.data.order import Order, generator, group_by
from clip_jax.data.pipeline import Draws, Element, Picture, check_named
from clip_jax.data.sources import Pair, PairSource
from clip_jax.errors import RecordError
from flamingo_jax.data import questions
from flamingo_jax.data.documents import IMAGE_TAG, Document, Media, Shape, encode, length
from flamingo_jax.data.prompts import CAPTION, Shot, question
from flamingo_jax.data.tokenizer import TextTokenizer

TASKS = ("caption", "kind", "colour", "which")
MOVES = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking", "turning", "standing still")


Catalogue = tuple[list[str], list[str], list[str | None]]


def catalogue(source: PairSource, image_size: int) -> Catalogue:
    """Names, groups and main colours of all records. A record that does not decode has no colour."""
    names: list[str] = []
    groups: list[str] = []
    colours: list[str | None] = []
    for i in range(len(source)):
        pair = source[i]
        names.append(pair.text)
        groups.append(pair.group)
        try:
            image = transforms.decode(pair.image, pair.key)
            colours.append(questions.main_colour(transforms.evaluation_image(image, image_size)))
        except RecordError:
            colours.append(None)
    return names, groups, colours


class PromptTexts:
    """Pages as `EmojiDocuments` has them, but without images, their answers drawn blindly: what a language model
    reads to know how such pages go and which answers there are. Random access to strings.
    """

    def __init__(self, source: PairSource, pages: int = 6000, shots: int = 5):
        names, groups, colours = catalogue(source, 32)
        self._names = sorted(set(names))
        self._kinds = sorted({questions.KINDS[group] for group in groups})
        self._colours = sorted({colour for colour in colours if colour is not None})
        self._pages, self._shots = pages, shots

    def __len__(self) -> int:
        return self._pages

    def __getitem__(self, index: SupportsIndex) -> str:
        rng = generator(int(index), 4)
        task = TASKS[int(rng.integers(len(TASKS)))]
        return "".join(
            f"{IMAGE_TAG}{prompt} {answer}" for prompt, answer in (self._shot(task, rng) for _ in range(self._shots))
        )

    def _shot(self, task: str, rng: np.random.Generator) -> tuple[str, str]:
        def one(of: Sequence[str]) -> str:
            return of[int(rng.integers(len(of)))]

        if task == "caption":
            return CAPTION, one(self._names)
        if task == "kind":
            return question(questions.KIND_QUESTION), one(self._kinds)
        if task == "colour":
            return question(questions.COLOUR_QUESTION), one(self._colours)
        pair = [self._kinds[int(i)] for i in rng.permutation(len(self._kinds))[:2]]
        return question(questions.which_question(*pair)), one(pair)


@dataclass(frozen=True)
class EmojiDocuments:
    """The document at a position, of one kind ("pages", "pairs" or "clips"), as the model's arrays.

    `next_rate`: how often a page's texts stand before their image and attend it (p_next of the paper).
    `listing`: the source's catalogue at the shape's image size, where it has been made already.
    """

    kind: str
    source: PairSource
    seed: int
    tokenizer: TextTokenizer
    shape: Shape
    end_id: int
    augment: transforms.Augmentation
    next_rate: float = 0.0
    tasks: Sequence[str] = TASKS
    listing: Catalogue | None = None
    _draws: dict[str, Draws] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        names, groups, colours = self.listing or catalogue(self.source, self.shape.image_size)
        keys: dict[str, Sequence[str | None]] = {"caption": names, "which": groups, "kind": groups, "colour": colours}
        cache: dict[int, tuple[Pair, Picture]] = {}
        for task in self.tasks:
            some = [[i for i in group if keys[task][i] is not None] for group in group_by(keys[task])]
            order = Order(len(self.source), self.seed, [group for group in some if group])
            self._draws[task] = Draws(self.source, order, cache)

    def __call__(self, position: int) -> Element:
        rng = generator(self.seed, position, 3)
        make: Callable[[int, np.random.Generator], tuple[Document, int]] = getattr(self, f"_{self.kind}")
        document, rejected = make(position, rng)
        element = encode(document, self.tokenizer, self.shape, self.end_id, key=f"{self.kind} {position}")
        return element | {"rejected": np.array(rejected, np.int32)}

    def _pages(self, position: int, rng: np.random.Generator) -> tuple[Document, int]:
        task = self.tasks[int(rng.integers(len(self.tasks)))]
        shots, rejected, room = [], 0, self.shape.tokens - 1
        for place in range(self.shape.images):
            shot, bad = self._shot(task, position * self.shape.images + place)
            rejected += bad
            room -= length(shot.parts(), self.tokenizer)
            if room < 0:  # a page ends where the next text no longer fits
                break
            shots.append(shot)
        if rng.random() < self.next_rate:
            parts = [part for shot in shots for part in (*shot.without_media().parts(), shot.media) if part is not None]
            return Document(parts, attend="next"), rejected
        return Document([part for shot in shots for part in shot.parts()]), rejected

    def _pairs(self, position: int, rng: np.random.Generator) -> tuple[Document, int]:
        shot, rejected = self._shot("caption", position)
        return Document(shot.parts()), rejected

    def _clips(self, position: int, rng: np.random.Generator) -> tuple[Document, int]:
        move = MOVES[rng.integers(len(MOVES))]

        def clip(pair: Pair, image: Picture, _: np.random.Generator) -> Shot:
            check_named(pair)
            frames = moving(transforms.whole(image), move, self.shape.frames, self.shape.image_size)
            return Shot(Media(frames), CAPTION, f"{pair.text}, {move}")

        shot, rejected = self._draws["caption"](position, clip)
        return Document(shot.parts()), rejected

    def _shot(self, task: str, position: int) -> tuple[Shot, int]:
        def shot(pair: Pair, image: Picture, rng: np.random.Generator) -> Shot:
            check_named(pair)
            media = Media(transforms.training_image(image, self.shape.image_size, self.augment, rng)[None])
            if task == "caption":
                return Shot(media, CAPTION, pair.text)
            if task == "kind":
                return Shot(media, question(questions.KIND_QUESTION), questions.KINDS[pair.group])
            if task == "colour":
                # The record has one, but a replacement for a bad one may not.
                pixels = transforms.evaluation_image(transforms.whole(image), self.shape.image_size)
                answer = questions.main_colour(pixels) or "grey"
                return Shot(media, question(questions.COLOUR_QUESTION), answer)
            kind = questions.KINDS[pair.group]
            others = [other for other in questions.KINDS.values() if other != kind]
            two = [kind, others[int(rng.integers(len(others)))]]
            first, second = two if rng.random() < 0.5 else two[::-1]
            return Shot(media, question(questions.which_question(first, second)), kind)

        return self._draws[task](position, shot)


def moving(image: Image.Image, move: str, frames: int, size: int) -> np.ndarray:
    """A picture that moves over `frames` frames. uint8 [F, S, S, 3], on white."""
    width, height = image.size
    clip = np.empty((frames, size, size, 3), np.uint8)
    for f in range(frames):
        t = f / max(frames - 1, 1)  # 0 … 1
        scale, angle, x, y = 1.0, 0.0, 0.0, 0.0  # of the window over the picture
        if move == "growing":
            scale = 1.8 - 0.8 * t
        elif move == "shrinking":
            scale = 1.0 + 0.8 * t
        elif move == "turning":
            angle = math.pi / 2 * t
        elif move != "standing still":
            dx, dy = {"left": (1, 0), "right": (-1, 0), "up": (0, 1), "down": (0, -1)}[move.removeprefix("moving ")]
            x, y, scale = dx * 0.5 * (t - 0.5) * width, dy * 0.5 * (t - 0.5) * height, 1.3
        w, h = width * scale, height * scale
        box = (width / 2 - w / 2 + x, height / 2 - h / 2 + y, width / 2 + w / 2 + x, height / 2 + h / 2 + y)
        frame = image.transform(
            (size, size), Image.Transform.AFFINE, transforms.turned(box, angle, size), Image.Resampling.BILINEAR,
            fillcolor=(255, 255, 255),
        )  # fmt: skip
        clip[f] = np.asarray(frame)
    return clip
