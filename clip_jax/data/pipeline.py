"""What a training step gets: batches as a pure function of (config, seed, step), read by Grain's threads or, for
more cores than one interpreter can use, by processes (`clip_jax.data.workers`).
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, SupportsIndex, TypeVar, runtime_checkable

import numpy as np
from PIL import Image

from clip_jax.data import transforms, workers
from clip_jax.data.order import Order, generator
from clip_jax.data.preprocess import Preprocess
from clip_jax.data.sources import Pair, PairSource
from clip_jax.data.tokenizer import Tokenizer
from clip_jax.data.workers import Batch, Skips
from clip_jax.errors import DataError, RecordError

Element = dict[str, np.ndarray]
Picture = Image.Image | transforms.Jpeg
T = TypeVar("T")
ROWS_AT_A_TIME = 32
MAX_ATTEMPTS = 32  # bad records in a row at one position, after which the source is given up

MAX_REPORTED = 1000  # records that are named in a process; the others are counted

_reported: set[str] = set()
_skips: ContextVar[Skips | None] = ContextVar("skips", default=None)  # of the piece that is being read


@runtime_checkable
class Sharded(Protocol):
    """A source of several files; `locate` names the file that a record lies in, and its row there."""

    files: Sequence[str]

    def locate(self, index: SupportsIndex) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Stream:
    """One data set of a task's mixture: the example at every position, how many a step draws, its loss's weight."""

    element: Callable[[int], Element]
    batch_size: int
    weight: float = 1.0


def draw(
    order: Order,
    position: int,
    use: Callable[[int, np.random.Generator], T],
    kind: int = 2,
    source: object = None,
) -> tuple[T, int]:
    """(what `use` makes of the record at a position and of a generator of its own, bad records replaced).

    A record for which `use` raises RecordError is replaced by the one that `order` names next.
    `kind` tells one use of randomness from another; of `source` the name of a bad record's file is asked.
    Raises DataError after MAX_ATTEMPTS bad records.
    """
    for attempt in range(MAX_ATTEMPTS):
        rng, index = generator(order.seed, position, attempt, kind), order.index(position, attempt)
        try:
            return use(index, rng), attempt
        except RecordError as error:
            if (skips := _skips.get()) is not None:
                skips[error.reason, error.shard or _shard(source, index)] += 1
            if str(error) not in _reported and len(_reported) < MAX_REPORTED:  # once for each record and process
                _reported.add(str(error))
                logging.warning("record replaced: %s", error)
                if len(_reported) == MAX_REPORTED:
                    logging.warning("%d records named; more will be counted, and not named", MAX_REPORTED)
    raise DataError(f"{MAX_ATTEMPTS} bad records in a row at position {position}; see the warnings above")


def _shard(source: object, index: int) -> str:
    """The file that a record lies in, of a source that has several."""
    if isinstance(source, Sharded):
        return source.files[source.locate(index)[0]]
    return ""


@dataclass(frozen=True)
class Draws:
    """The record at a position, its image opened; a bad one is replaced by the one that `order` names next and counted.

    `cache`: where opened records are kept, if the source is small enough for it.
    """

    source: PairSource
    order: Order
    cache: dict[int, tuple[Pair, Picture]] | None = None

    def __call__(self, position: int, use: Callable[[Pair, Picture, np.random.Generator], T]) -> tuple[T, int]:
        """(what `use` makes of the record and a generator of this position's own, bad records replaced): see `draw`."""
        return draw(self.order, position, lambda index, rng: use(*self._read(index), rng), source=self.source)

    def _read(self, index: int) -> tuple[Pair, Picture]:
        if self.cache is not None and index in self.cache:
            return self.cache[index]
        pair = self.source[index]
        found = pair, transforms.open_image(pair.image, pair.key)
        if self.cache is not None:
            self.cache[index] = found
        return found


def check_named(pair: Pair) -> None:
    """Raises RecordError where a record's text is empty."""
    if not pair.text.strip():
        raise RecordError(f"{pair.key}: the text is empty", reason="empty_caption")


@dataclass(frozen=True)
class PairElements:
    """The training example at a position: image uint8 [S, S, 3], text int32 [L], `rejected` (a count).

    `keyword_rate`: how often keywords, some of them in random order, join the text or stand in its place.
    """

    draws: Draws
    tokenizer: Tokenizer
    image_size: int
    context_length: int
    augment: transforms.Augmentation
    keyword_rate: float = 0.0

    def __call__(self, position: int) -> Element:
        element, rejected = self.draws(position, self._element)
        return element | {"rejected": np.array(rejected, np.int32)}

    def _element(self, pair: Pair, image: Picture, rng: np.random.Generator) -> Element:
        check_named(pair)
        text = self.tokenizer(self._text(pair.text, pair.keywords, rng), self.context_length)[0]
        return {"image": transforms.training_image(image, self.image_size, self.augment, rng), "text": text}

    def _text(self, text: str, keywords: Sequence[str], rng: np.random.Generator) -> str:
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

    `workers`: processes that read; 0 is none, only threads of this process. `threads`: of each process.
    """

    element: Callable[[int], Element]
    batch_size: int
    rows: np.ndarray
    threads: int = 2
    prefetch: int = 2  # batches
    workers: int = 0

    def __call__(self, start: int, stop: int) -> Iterator[Element]:
        """The arrays of each batch."""
        return (dict(batch.arrays) for batch in self.read(start, stop))

    def read(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches with what there is to say of them. Raises DataError where a worker ends before its time."""
        if start >= stop:
            return iter(())
        # Some rows are read at a time: handing over each by itself would cost more than reading it.
        at_a_time = max(ROWS_AT_A_TIME, workers.fewest_rows(len(self.rows), self.prefetch))
        if self.workers:  # none idle while another reads the last piece
            fewest = workers.fewest_rows(len(self.rows), self.prefetch)
            at_a_time = max(min(at_a_time, len(self.rows) // (2 * self.workers)), fewest, 1)
        pieces = _Pieces(self.element, self.batch_size, np.array_split(self.rows, -(-len(self.rows) // at_a_time)))
        if self.workers:
            return workers.batches(
                pieces,
                self.element(start * self.batch_size + int(self.rows[0])),
                [len(rows) for rows in pieces.parts],
                range(start, stop),
                workers=self.workers,
                threads=self.threads,
                prefetch=max(1, self.prefetch),
            )
        import grain

        parts = len(pieces.parts)
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=max(1, self.prefetch * parts))
        read = grain.MapDataset.range(start * parts, stop * parts).map(pieces).to_iter_dataset(options)
        return iter(read.batch(parts, batch_fn=_together))


@dataclass(frozen=True)
class _Pieces:
    """Piece `step · len(parts) + i`: the rows `parts[i]` of a step's batch."""

    element: Callable[[int], Element]
    batch_size: int
    parts: Sequence[np.ndarray]

    def __call__(self, piece: int, into: Mapping[str, np.ndarray] | None = None) -> Batch:
        """The piece, in new arrays or written to those given."""
        step, part = divmod(int(piece), len(self.parts))
        skips: Skips = Counter()
        began, before, token = time.perf_counter(), time.thread_time(), _skips.set(skips)
        try:
            elements = (self.element(step * self.batch_size + int(row)) for row in self.parts[part])
            if into is None:
                into = _join(list(elements), np.stack)
            else:
                for i, element in enumerate(elements):
                    for name, value in element.items():
                        if value.shape != into[name].shape[1:]:
                            raise ValueError(
                                f"{name}: {value.shape}; {into[name].shape[1:]} expected, as the first has"
                            )
                        np.copyto(into[name][i, ...], value, casting="no")
        finally:
            _skips.reset(token)
        return Batch(into, skips, time.thread_time() - before, time.perf_counter() - began)


def _together(pieces: Sequence[Batch]) -> Batch:
    return Batch(
        _join([dict(piece.arrays) for piece in pieces], np.concatenate),
        sum((piece.skips for piece in pieces), start=Counter()),
        sum(piece.busy for piece in pieces),
        sum(piece.taken for piece in pieces),
    )


def _join(elements: Sequence[Element], how: Callable[[list[np.ndarray]], np.ndarray]) -> Element:
    return {key: how([element[key] for element in elements]) for key in elements[0]}


def evaluation_batches(
    source: PairSource, preprocess: Preprocess, batch_size: int, rows: np.ndarray, threads: int = 2
) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """All records of a source in order, this process's rows of each batch: ({"image"}, good).

    Images are uint8. `good` [len(rows)] bool tells which rows are records that decode; the others', and those that
    fill up the last batch, are black.
    """

    def element(position: int) -> Element:
        if position < len(source):
            try:
                pair = source[position]
                return {"image": preprocess.pixels(pair.image, pair.key), "good": np.array(True)}
            except RecordError as error:
                logging.warning("record left out of the evaluation: %s", error)
        black = np.zeros((preprocess.image_size, preprocess.image_size, 3), np.uint8)
        return {"image": black, "good": np.array(False)}

    for batch in Batches(element, batch_size, rows, threads)(0, -(-len(source) // batch_size)):
        yield {"image": batch["image"]}, batch["good"]
