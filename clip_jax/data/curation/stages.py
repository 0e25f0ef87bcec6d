"""The Beam pipelines of each stage: `root` is a pipeline, `parts` the numbers of the source's parts.

A worker's functions hold settings and what they read in `setup`, nothing of the process that began the run.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.transforms.window import GlobalWindows

from clip_jax.data.curation import balance, duplicates, files, records, shards
from clip_jax.data.curation.matching import Matcher
from clip_jax.data.curation.queries import read_queries
from clip_jax.data.curation.records import Inspector, Row
from clip_jax.data.curation.settings import Settings
from clip_jax.data.sources import Pair, open_source
from clip_jax.errors import DataError, RecordError

KEPT = pa.schema({"place": pa.int32(), "queries": pa.list_(pa.int32())})


def scan(root: Any, settings: Settings, parts: Sequence[int], size: int) -> Any:
    return root | beam.Create(parts) | beam.Reshuffle() | beam.ParDo(Scan(settings, size))


class Scan(beam.DoFn):
    """A part's number → its table of rows."""

    def __init__(self, settings: Settings, size: int):
        self._settings, self._size = settings, size

    def setup(self) -> None:
        texts = [query.text for query in read_queries(self._settings.queries)]
        matcher = Matcher(texts, self._settings.match == "words")
        self._inspector = Inspector(matcher, self._settings.filters, self._settings.seed)
        self._source = open_source(self._settings.input)

    def process(self, part: int) -> None:
        first = part * self._settings.part
        rows = map(self._row, range(first, min(first + self._settings.part, self._size)))
        files.write_table(self._settings.file("scan", part), records.columns(rows), records.SCHEMA)

    def _row(self, index: int) -> Row:
        try:
            return self._inspector.row(index, self._source[index])
        except RecordError as error:
            return Row(index, reason=error.reason)


def unique(root: Any, settings: Settings, parts: Sequence[int], size: int) -> Any:
    whole = root | beam.Create(parts) | beam.Reshuffle()
    left = [whole | "Accepted" >> beam.ParDo(Accepted(settings))]
    left.append(duplicates.smallest(left[-1], duplicates.IMAGE, 1))
    if settings.max_per_text:
        left.append(duplicates.smallest(left[-1], duplicates.TEXT, settings.max_per_text))
    if settings.near_duplicates >= 0:
        left.append(duplicates.smallest(left[-1], duplicates.PERCEPTUAL, 1))
    if settings.near_duplicates > 0:
        left[-1] = duplicates.without_near(left[-1], size, settings.near_duplicates)
    # A part of which nothing is left has its file, too.
    empty = whole | "Every part" >> beam.Map(_no_place)
    placed = left[-1] | "Place" >> beam.Map(_place, settings.part)
    tables = (placed, empty) | beam.Flatten() | "By part" >> beam.GroupByKey()
    tables | "Write" >> beam.ParDo(WritePlaces(settings))
    names = ["filtered", "image"] + ["text"] * bool(settings.max_per_text) + ["near"] * (settings.near_duplicates >= 0)
    counts = [
        step | f"Count {name}" >> beam.combiners.Count.Globally() | f"Name {name}" >> beam.Map(_named, name)
        for name, step in zip(names, left, strict=True)
    ]
    return (
        counts
        | "All counts" >> beam.Flatten()
        | "One" >> beam.WithKeys(None)
        | "Gather" >> beam.GroupByKey()
        | "Write counts" >> beam.ParDo(WriteItems(settings.file("unique", "left"), ("step", "pairs")))
    )


class Accepted(beam.DoFn):
    """A part's number → its pairs that no filter refused."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def process(self, part: int) -> Iterator[duplicates.Pair]:
        table = files.read_table(self._settings.file("scan", part))
        names = ("rank", "index", "image", "text", "perceptual", "reason")
        for *pair, reason in zip(*(table[name].to_pylist() for name in names), strict=True):
            if not reason:
                yield tuple(pair)


class WritePlaces(beam.DoFn):
    """(a part's number, places of its pairs) → a table of them, ascending."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def process(self, element: tuple[int, Iterable[int]]) -> None:
        places = np.array(sorted(place for place in element[1] if place >= 0), np.int32)
        files.write_table(self._settings.file("unique", element[0]), {"place": places})


class WriteItems(beam.DoFn):
    """(anything, pairs of a key and a value) → a table, sorted."""

    def __init__(self, path: str, names: tuple[str, str]):
        self._path, self._names = path, names

    def process(self, element: tuple[Any, Iterable[tuple[Any, Any]]]) -> None:
        rows = sorted(element[1])
        files.write_table(self._path, {name: [row[i] for row in rows] for i, name in enumerate(self._names)})


class SumArrays(beam.CombineFn):
    """Dictionaries of arrays → their sums, by name."""

    def create_accumulator(self) -> dict[str, np.ndarray]:
        return {}

    def add_input(self, total: dict[str, np.ndarray], one: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**total, **{name: total.get(name, 0) + array for name, array in one.items()}}

    def merge_accumulators(self, totals: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        merged: dict[str, np.ndarray] = {}
        for total in totals:
            merged = self.add_input(merged, total)
        return merged

    def extract_output(self, total: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return total


class Counting(beam.DoFn):
    """Sums over the parts of a bundle, an array a name; they leave when it ends."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def setup(self) -> None:
        self._queries = len(read_queries(self._settings.queries))

    def start_bundle(self) -> None:
        self._sums: dict[str, np.ndarray] = {}

    def add(self, name: str, array: Any) -> None:
        self._sums[name] = self._sums.get(name, 0) + np.asarray(array, np.int64)

    def add_queries(self, name: str, lists: Iterable[list[int]]) -> None:
        self.add(name, np.bincount([i for one in lists for i in one], minlength=self._queries))

    def finish_bundle(self) -> Iterator[Any]:
        yield GlobalWindows.windowed_value(self._sums)


def count(root: Any, settings: Settings, parts: Sequence[int]) -> Any:
    totals = root | beam.Create(parts) | beam.Reshuffle() | beam.ParDo(CountQueries(settings))
    return totals | beam.CombineGlobally(SumArrays()).with_fanout(16) | beam.ParDo(WriteCounts(settings))


class CountQueries(Counting):
    """A part's number → pairs of each query: all, those that no filter refused, those that are no duplicates."""

    def process(self, part: int) -> None:
        table = files.read_table(self._settings.file("scan", part), ["reason", "queries"])
        reasons, queries = table["reason"].to_pylist(), table["queries"].to_pylist()
        places = files.read_table(self._settings.file("unique", part))["place"].to_pylist()
        self.add_queries("read", queries)
        self.add_queries("filtered", (q for q, reason in zip(queries, reasons, strict=True) if not reason))
        self.add_queries("unique", (queries[place] for place in places))
        self.add("reason:no_query", [sum(not queries[place] for place in places)])
        for reason in reasons:
            if reason:
                self.add(f"reason:{reason}", [1])


class WriteCounts(beam.DoFn):
    def __init__(self, settings: Settings):
        self._settings = settings

    def process(self, totals: dict[str, np.ndarray]) -> None:
        reasons = {name.partition(":")[2]: int(n[0]) for name, n in sorted(totals.items()) if ":" in name}
        table = {"reason": list(reasons), "pairs": list(reasons.values())}
        files.write_table(self._settings.file("counts", "reasons"), table)
        queries = {name: totals[name] for name in ("read", "filtered", "unique")}
        files.write_table(self._settings.file("counts", "queries"), queries)


def left(settings: Settings, part: int) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """A part's pairs that are no duplicates: their places, ranks and queries."""
    places = files.read_table(settings.file("unique", part))["place"].to_numpy()
    table = files.read_table(settings.file("scan", part), ["rank", "queries"]).take(places)
    return places, table["rank"].to_numpy(), table["queries"].to_pylist()


def unique_counts(settings: Settings) -> np.ndarray:
    """Pairs of each query that are no duplicates. [Q]"""
    return files.read_table(settings.file("counts", "queries"))["unique"].to_numpy()


def cut(root: Any, settings: Settings, parts: Sequence[int]) -> Any:
    cuts = (
        root
        | beam.Create(parts)
        | beam.Reshuffle()
        | "Candidates" >> beam.ParDo(Candidates(settings))
        | "Smallest" >> beam.CombinePerKey(balance.Smallest(settings.max_per_query))
        | "Largest" >> beam.Map(_largest, settings.max_per_query)
    )
    none = root | "No cut" >> beam.Create([(-1, -1)])  # so that there is a table where no query has more than t
    together = (cuts, none) | beam.Flatten() | beam.WithKeys(None) | beam.GroupByKey()
    return together | "Write" >> beam.ParDo(WriteItems(settings.file("cuts", "cuts"), ("query", "rank")))


class Candidates(beam.DoFn):
    """A part's number → (query of more than t pairs, ranks that may be among its t smallest)."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def setup(self) -> None:
        self._bounds = balance.candidates(unique_counts(self._settings), self._settings.max_per_query)

    def process(self, part: int) -> Iterator[tuple[int, np.ndarray]]:
        _, ranks, queries = left(self._settings, part)
        yield from balance.by_query(ranks, queries, self._bounds)


def balanced(root: Any, settings: Settings, parts: Sequence[int]) -> Any:
    totals = root | beam.Create(parts) | beam.Reshuffle() | beam.ParDo(Balance(settings, len(parts)))
    return totals | beam.CombineGlobally(SumArrays()).with_fanout(16) | beam.ParDo(WriteKept(settings))


class Balance(Counting):
    """A part's number → the table of its pairs that stay, with the queries that they hold."""

    def __init__(self, settings: Settings, parts: int):
        super().__init__(settings)
        self._parts = parts

    def setup(self) -> None:
        super().setup()
        t, counts = self._settings.max_per_query, unique_counts(self._settings)
        if self._settings.balance == "probability":
            self._bounds = balance.shares(counts, t)
            return
        self._bounds = np.full(len(counts), records.RANKS - 1)
        cuts = files.read_table(self._settings.file("cuts", "cuts"))
        query, rank = cuts["query"].to_numpy(), cuts["rank"].to_numpy()
        self._bounds[query[query >= 0]] = rank[query >= 0]

    def process(self, part: int) -> None:
        places, ranks, queries = left(self._settings, part)
        stays = balance.kept(ranks, queries, self._bounds)
        chosen = [q for q, stay in zip(queries, stays, strict=True) if stay]
        files.write_table(self._settings.file("balance", part), {"place": places[stays], "queries": chosen}, KEPT)
        self.add_queries("kept", chosen)
        self.add("sizes", np.bincount([part], weights=[len(chosen)], minlength=self._parts))


class WriteKept(beam.DoFn):
    def __init__(self, settings: Settings):
        self._settings = settings

    def process(self, totals: dict[str, np.ndarray]) -> None:
        for name in ("kept", "sizes"):
            files.write_table(self._settings.file("balance", name), {"pairs": totals[name]})


def write_shards(root: Any, settings: Settings, planned: Sequence[list[shards.Slice]], missing: Sequence[int]) -> Any:
    firsts = np.cumsum([0] + [sum(s.last - s.first for s in slices) for slices in planned]).tolist()
    tasks = [(shards.stem(settings.shards, i, len(planned)), firsts[i], planned[i]) for i in missing]
    return root | beam.Create(tasks) | beam.Reshuffle() | beam.ParDo(WriteShard(settings))


class WriteShard(beam.DoFn):
    """(where, the number of its first pair, what it holds) → a shard."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def setup(self) -> None:
        self._queries = [query.text for query in read_queries(self._settings.queries)]
        self._source = open_source(self._settings.input)

    def process(self, task: tuple[str, int, list[shards.Slice]]) -> None:
        stem, first, slices = task
        shards.write(stem, first, self._pairs(slices))

    def _pairs(self, slices: list[shards.Slice]) -> Iterator[tuple[Pair, list[str]]]:
        """Raises DataError where the source gives another image than it did to `scan`."""
        for one in slices:
            kept = files.read_table(self._settings.file("balance", one.part)).slice(one.first, one.last - one.first)
            places = kept["place"].to_pylist()
            digests = files.read_table(self._settings.file("scan", one.part), ["image"])["image"].take(places)
            for place, queries, digest in zip(places, kept["queries"].to_pylist(), digests.to_pylist(), strict=True):
                index = one.part * self._settings.part + place
                pair = self._source[index]
                if records.digest(pair.image) != digest:
                    raise DataError(f"{self._settings.input}, record {index}: not the image that it was before")
                yield pair, [self._queries[i] for i in queries]


def _largest(item: tuple[int, np.ndarray], t: int) -> tuple[int, int]:
    query, ranks = item
    if len(ranks) < t:
        raise DataError(f"query {query}: fewer than {t} ranks below its bound, as by chance none has; try another seed")
    return query, int(ranks[-1])


def _place(pair: duplicates.Pair, part: int) -> tuple[int, int]:
    _, index, *_ = pair
    return divmod(index, part)


def _no_place(part: int) -> tuple[int, int]:
    return part, -1


def _named(count: int, name: str) -> tuple[str, int]:
    return name, count
