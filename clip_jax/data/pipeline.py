"""What a training step gets: batches as a pure function of (config, seed, step), read by Grain's threads."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import grain
import numpy as np
from PIL import Image

from clip_jax.data import transforms
from clip_jax.data.order import Order, generator
from clip_jax.data.sources import Pair, PairSource
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import DataError, RecordError

Element = dict[str, np.ndarray]
ROWS_AT_A_TIME = 32
MAX_ATTEMPTS = 32  # bad records in a row at one position, after which the source is given up

_reported: set[str] = set()


@dataclass(frozen=True)
class PairElements:
    """The training example at a position: image uint8 [S, S, 3], text int32 [L], `rejected` (a count).

    A bad record is replaced by the one that `order` names next for this position, and counted.
    `keyword_rate`: how often keywords, some of them in random order, join the text or stand in its place.
    `cache`: keep decoded records in memory, where the source is small enough.
    """

    source: PairSource
    order: Order
    tokenizer: Tokenizer
    image_size: int
    context_length: int
    augment: transforms.Augmentation
    keyword_rate: float = 0.0
    cache: bool = False
    _cached: dict[int, tuple[Pair, Image.Image]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, position: int) -> Element:
        for attempt in range(MAX_ATTEMPTS):
            index = self.order.index(position, attempt)
            rng = generator(self.order.seed, position, attempt, 2)
            try:
                pair, image = self._read(index)
                text = self.tokenizer(self._text(pair.key, pair.text, pair.keywords, rng), self.context_length)[0]
            except RecordError as error:
                if str(error) not in _reported:  # once for each record and process
                    _reported.add(str(error))
                    logging.warning("record replaced: %s", error)
                continue
            return {
                "image": transforms.training_image(image, self.image_size, self.augment, rng),
                "text": text,
                "rejected": np.int32(attempt),
            }
        raise DataError(f"{MAX_ATTEMPTS} bad records in a row at position {position}; see the warnings above")

    def _read(self, index: int) -> tuple[Pair, Image.Image]:
        if index in self._cached:
            return self._cached[index]
        pair = self.source[index]
        image = transforms.decode(pair.image, pair.key)
        if self.cache:
            self._cached[index] = pair, image
        return pair, image

    def _text(self, key: str, text: str, keywords: Sequence[str], rng: np.random.Generator) -> str:
        if not text.strip():
            raise RecordError(f"{key}: the text is empty")
        if keywords and rng.random() < self.keyword_rate:
            count = rng.integers(1, min(len(keywords), 4) + 1)
            chosen = [keywords[i] for i in rng.permutation(len(keywords))[:count]]
            # Keywords alone, too: a name must not be what the text is recognised by.
            return ", ".join([text, *chosen] if rng.random() < 0.5 else chosen)
        return text


@dataclass(frozen=True)
class Batches:
    """This process's rows of the batches of steps start … stop - 1.

    `rows` are the global rows that its devices hold (`sharding.local_rows`): step s holds the positions
    s·batch_size + row. The state of the input is therefore the step.
    """

    element: Callable[[int], Element]
    batch_size: int
    rows: np.ndarray
    threads: int = 2
    prefetch: int = 2  # batches

    def __call__(self, start: int, stop: int) -> Iterator[Mapping[str, np.ndarray]]:
        # A thread reads some rows at a time: handing over each by itself would cost more than reading it.
        parts = np.array_split(self.rows, -(-len(self.rows) // ROWS_AT_A_TIME))

        def read(j: int) -> Element:
            step, part = divmod(int(j), len(parts))
            return _join([self.element(step * self.batch_size + int(row)) for row in parts[part]], np.stack)

        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=max(1, self.prefetch * len(parts)))
        pieces = grain.MapDataset.range(start * len(parts), stop * len(parts)).map(read).to_iter_dataset(options)
        return iter(pieces.batch(len(parts), batch_fn=lambda some: _join(some, np.concatenate)))


def _join(elements: Sequence[Element], how: Callable[[list[np.ndarray]], np.ndarray]) -> Element:
    return {key: how([element[key] for element in elements]) for key in elements[0]}


def evaluation_batches(
    source: PairSource, image_size: int, batch_size: int, rows: np.ndarray
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """All records of a source in order, this process's rows of each batch: ({"image"}, good).

    The last batch is filled up with its last record. `good` [batch_size] bool tells, for all rows this
    process holds, which are records that decode; the others' images are black.
    """
    for start in range(0, len(source), batch_size):
        images = np.zeros((len(rows), image_size, image_size, 3), np.uint8)
        good = np.zeros(len(rows), bool)
        for j, row in enumerate(rows):
            if start + row < len(source):
                try:
                    pair = source[start + int(row)]
                    image = transforms.read_image(pair.image, pair.key)
                    images[j] = transforms.evaluation_image(image, image_size, key=pair.key)
                    good[j] = True
                except RecordError as error:
                    logging.warning("record left out of the evaluation: %s", error)
        yield {"image": images}, good
