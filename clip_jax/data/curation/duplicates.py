"""Pairs that say again what another one says; of each, the one of the smallest rank stays.

By the image's digest; by the text's, of which some may stay; and by perceptual hashes of which at most d of 64 bits
differ: a pair goes if one of a smaller rank is that near. No chain is followed, so the rule needs no order of work.

Hashes that near are found exactly, without comparing all: cut into b = d + e blocks, two hashes that differ in d bits
agree in e blocks at least. So each is filed under every choice of e blocks, and compared with those filed beside it.
More blocks make longer keys, fewer to compare, and more to file (Manku, Jain and Sarma 2007, for eight billion pages).
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.transforms.combiners import Top

BITS = 64
BESIDE = 16  # hashes under one key, on average, if they were random


# What travels of a pair. Its order is that of ranks; the index decides between equal ones.
Pair = tuple[int, int, bytes, bytes, int]
RANK, INDEX, IMAGE, TEXT, PERCEPTUAL = range(5)


def plan(size: int, distance: int) -> list[tuple[int, ...]]:
    """The masks under which each of `size` hashes is filed: a mask is the bits of the blocks that must agree."""
    for extra in range(1, 5):
        blocks = distance + extra
        if extra == 4 or size <= BESIDE << (BITS * extra // blocks):
            break
    edges = [BITS * i // blocks for i in range(blocks + 1)]
    masks = [(1 << high) - (1 << low) for low, high in itertools.pairwise(edges)]
    return list(itertools.combinations(masks, extra))


class File(beam.DoFn):
    """A pair → ((table, the bits that must agree), (rank, index, hash)) for each table."""

    def __init__(self, tables: list[tuple[int, ...]]):
        self._masks = [sum(table) for table in tables]

    def process(self, pair: Pair) -> Iterator[tuple[tuple[int, int], tuple[int, int, int]]]:
        rank, index, _, _, perceptual = pair
        bits = perceptual & (1 << BITS) - 1
        for table, mask in enumerate(self._masks):
            key = bits & mask
            yield (table, key - (1 << BITS) if key >> BITS - 1 else key), (rank, index, perceptual)


class Losers(beam.DoFn):
    """Those filed under a key → the indices of those that have a near one of a smaller rank."""

    def __init__(self, distance: int):
        self._distance = distance

    def process(self, filed: tuple[Any, Iterable[tuple[int, int, int]]]) -> Iterator[tuple[int, bool]]:
        rows = sorted(filed[1])
        hashes = np.array([row[2] for row in rows], np.int64)
        for i in range(1, len(rows)):
            if (np.bitwise_count((hashes[:i] ^ hashes[i]).view(np.uint64)) <= self._distance).any():
                yield rows[i][1], True


class Winners(beam.DoFn):
    def process(self, joined: tuple[int, dict[str, list[Any]]]) -> Iterator[Pair]:
        if not joined[1]["lost"]:
            yield from joined[1]["pairs"]


def smallest(pairs: Any, field: int, n: int) -> Any:
    """Of the pairs of one value of a field, the n of the smallest ranks. Combined before they travel: no key is hot."""
    return (
        pairs
        | f"By {field}" >> beam.Map(_keyed, field)
        | f"Smallest by {field}" >> Top.SmallestPerKey(n)
        | f"Of {field}" >> beam.FlatMap(_values)
    )


def without_near(pairs: Any, size: int, distance: int) -> Any:
    """Pairs of different hashes without those that are near one of a smaller rank. `size`: about how many they are."""
    lost = (
        pairs
        | "File" >> beam.ParDo(File(plan(size, distance)))
        | "Beside" >> beam.GroupByKey()
        | "Losers" >> beam.ParDo(Losers(distance))
    )
    keyed = pairs | "By index" >> beam.Map(_keyed, INDEX)
    return {"pairs": keyed, "lost": lost} | "Join" >> beam.CoGroupByKey() | "Winners" >> beam.ParDo(Winners())


def _keyed(pair: Pair, field: int) -> tuple[Any, Pair]:
    return pair[field], pair


def _values(item: tuple[Any, list[Pair]]) -> list[Pair]:
    return item[1]
