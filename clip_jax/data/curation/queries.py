"""The list of queries: words and pairs of words of a corpus, titles, synsets; a file `queries.txt`.

CLIP, section 2.2: all words that occur at least 100 times in the English Wikipedia, bigrams of high pointwise mutual
information, names of articles above a search volume, and those WordNet synsets that are not among them.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam

from clip_jax.data.curation import files
from clip_jax.data.curation.texts import normal, words_and_bigrams
from clip_jax.data.sources import SOURCES, open_source
from clip_jax.errors import DataError, RecordError

TOTAL = ""  # no word; its count is that of all words
RANGE = 10_000  # pairs of a source that a worker reads in one go
FLUSH = 1_000_000  # distinct words and bigrams that a worker counts before it passes them on


@dataclass(frozen=True)
class Query:
    """A query in its normal form. `count`: in the corpus, or what its file says."""

    text: str
    source: str = "given"
    count: int = 0


@dataclass(frozen=True)
class QueryRules:
    """Which words and bigrams become queries. `min_pmi` is in bits; `max_bigrams` takes those of the highest."""

    min_count: int = 100
    min_pmi: float = 3.0
    max_bigrams: int = 100_000


@dataclass(frozen=True)
class Origin:
    """Where queries come from: a list of them; or a corpus (text files, a pattern of them, or a source of pairs),
    titles and synsets, each of which may be missing."""

    queries: str = ""
    corpus: str = ""
    titles: str = ""
    min_volume: int = 0
    synsets: str = ""
    rules: QueryRules = field(default_factory=QueryRules)


def read_queries(path: str) -> list[Query]:
    """Reads a query a line, in any case, or what `write_queries` writes. Of equal ones the first stays.

    Raises DataError where the file can't be read, is empty, or a count is no number.
    """
    queries = unique(Query(normal(text), *rest) for text, *rest in _rows(path, (("source", str), ("count", int))))
    if not queries:
        raise DataError(f"{path}: empty; expected a query a line")
    return queries


def write_queries(path: str, queries: Iterable[Query]) -> None:
    files.write_text(path, "".join(f"{query.text}\t{query.source}\t{query.count}\n" for query in queries))


def read_titles(path: str, min_volume: int) -> list[Query]:
    """Titles, one a line with, after a tab, how often it is looked for. Raises as `read_queries` does."""
    rows = ((title, *rest, 0)[:2] for title, *rest in _rows(path, (("search volume", int),)))
    return [Query(normal(title), "title", volume) for title, volume in rows if volume >= min_volume]


def read_synsets(path: str) -> list[Query]:
    """The words of synsets, one a line: "cat, true cat" or, with a definition, "cat, true cat: feline mammal"."""
    lines = (line for (line,) in _rows(path, ()))
    return [Query(normal(word), "synset") for line in lines for word in line.split(":")[0].split(",")]


def unique(queries: Iterable[Query]) -> list[Query]:
    """The first query of each text, in order, without empty ones."""
    found: dict[str, Query] = {}
    for query in queries:
        if query.text:
            found.setdefault(query.text, query)
    return list(found.values())


def from_counts(counts: Mapping[str, int], rules: QueryRules) -> list[Query]:
    """Words by their counts, then bigrams by their information; equal ones by the alphabet.

    Args:
      counts: a word, two words with a blank between them, or TOTAL → how often it occurs.
    """
    counts = {text: count for text, count in counts.items() if count >= rules.min_count or text == TOTAL}
    words = [Query(text, "word", count) for text, count in counts.items() if text and " " not in text]
    bigrams = [(pmi(text, counts), Query(text, "bigram", count)) for text, count in counts.items() if " " in text]
    bigrams = sorted((b for b in bigrams if b[0] >= rules.min_pmi), key=lambda b: (-b[0], b[1].text))
    return sorted(words, key=lambda q: (-q.count, q.text)) + [query for _, query in bigrams[: rules.max_bigrams]]


def pmi(bigram: str, counts: Mapping[str, int]) -> float:
    """log₂ of how much more often two words stand together than they would by chance."""
    first, second = bigram.split(" ")
    return math.log2(counts[bigram] * counts[TOTAL] / (counts[first] * counts[second]))


class CountWords(beam.DoFn):
    """Texts → (word or bigram, how often it occurs in a bundle): what travels are sums, not words."""

    def start_bundle(self) -> None:
        self._counts: Counter[str] = Counter()

    def process(self, text: str) -> Iterator[tuple[str, int]]:
        found = list(words_and_bigrams(normal(text)))
        self._counts.update(found)
        self._counts[TOTAL] += sum(" " not in one for one in found)
        if len(self._counts) > FLUSH:
            yield from self._counts.items()
            self._counts.clear()

    def finish_bundle(self) -> Iterator[Any]:
        yield from map(beam.window.GlobalWindows.windowed_value, self._counts.items())


class WriteCounts(beam.DoFn):
    """(anything, counts) → a table, sorted."""

    def __init__(self, path: str):
        self._path = path

    def process(self, element: tuple[None, Iterable[tuple[str, int]]]) -> None:
        rows = sorted(element[1])
        files.write_table(self._path, {"text": [text for text, _ in rows], "count": [count for _, count in rows]})


class ReadTexts(beam.DoFn):
    """Indices of a source → its texts."""

    def __init__(self, spec: str):
        self._spec = spec

    def setup(self) -> None:
        self._source = open_source(self._spec)

    def process(self, indices: range) -> Iterator[str]:
        for index in indices:
            with contextlib.suppress(RecordError):  # `scan` counts them
                yield self._source[index].text


def read_corpus(root: Any, corpus: str) -> Any:
    """A PCollection of texts. Raises DataError where there are none."""
    if corpus.partition(":")[0] in SOURCES:
        size = len(open_source(corpus))
        ranges = [range(first, min(first + RANGE, size)) for first in range(0, size, RANGE)]
        return root | beam.Create(ranges) | beam.Reshuffle() | beam.ParDo(ReadTexts(corpus))
    try:
        lines = beam.io.ReadFromText(corpus, coder=beam.coders.BytesCoder())
    except OSError:
        raise DataError(f"{corpus}: no such file; expected texts, one a line, or KIND:WHERE") from None
    return root | lines | beam.Map(bytes.decode, "utf-8", "replace")


def count_words(root: Any, origin: Origin, path: str) -> Any:
    """Counts the words and bigrams of a corpus into a table at `path`, of what occurs often enough."""
    return (
        read_corpus(root, origin.corpus)
        | "CountWords" >> beam.ParDo(CountWords())
        | "Sum" >> beam.CombinePerKey(sum)
        | "Often" >> beam.Filter(_often, origin.rules.min_count)
        | "Together" >> beam.WithKeys(None)
        | "Gather" >> beam.GroupByKey()
        | "WriteCounts" >> beam.ParDo(WriteCounts(path))
    )


def read_counts(path: str) -> dict[str, int]:
    table = files.read_table(path)
    return dict(zip(table["text"].to_pylist(), table["count"].to_pylist(), strict=True))


def _often(item: tuple[str, int], min_count: int) -> bool:
    return item[1] >= min_count or item[0] == TOTAL


def _rows(path: str, columns: Sequence[tuple[str, type]]) -> Iterator[tuple[Any, ...]]:
    """The lines of a file, split at tabs: a text, then as many of the columns as there are."""
    try:
        lines = files.read_text(path).split("\n")
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from None
    for number, line in enumerate(lines, 1):
        text, *values = line.rstrip("\r").split("\t")
        if len(values) > len(columns):
            raise DataError(f"{path}, line {number}: {len(values)} tabs; expected at most {len(columns)}")
        row = [text]
        for value, (name, kind) in zip(values, columns, strict=False):
            try:
                row.append(kind(value))
            except ValueError:
                raise DataError(f"{path}, line {number}: {name} {value!r}; expected a whole number") from None
        yield tuple(row)
