"""At most t pairs for a query, the same ones whatever the workers, their number and the order of the pairs.

Every pair has one random rank (`records.rank`). By the rule `cap` a pair stays if, for at least one of its queries, it
is among the t pairs of the smallest ranks; by the rule `probability` if its rank is below the share
max over its queries of t / count. One rank for all queries: pairs that one query keeps are those that the next keeps.
(MetaCLIP draws anew for each query a pair has, and so keeps 1 - Π(1 - t / count) instead of the maximum.)

What travels for the cap are the ranks of a query's first pairs, at most some t of them, however many it has.
"""

import math
from collections.abc import Iterable, Iterator

import apache_beam as beam
import numpy as np

from clip_jax.data.curation.records import RANKS

RULES = ("cap", "probability")


def shares(counts: np.ndarray, t: int) -> np.ndarray:
    """min(1, t / count) of each query, as a bound on ranks: one stays if it is ≤ the bound. [Q] int64"""
    return np.array([RANKS - 1 if n <= t else RANKS * t // n - 1 for n in counts.tolist()], np.int64)


def candidates(counts: np.ndarray, t: int) -> np.ndarray:
    """Bounds below which a query surely has t ranks, and not many more. [Q] int64; -1 where all its pairs stay.

    Ranks below the bound are Poisson with mean t + 8√t + 32: fewer than t is a matter of eight standard deviations.
    """
    wanted = t + 8 * math.isqrt(t) + 32
    return np.array([-1 if n <= t else min(RANKS - 1, RANKS * wanted // n) for n in counts.tolist()], np.int64)


def kept(ranks: np.ndarray, queries: Iterable[list[int]], bounds: np.ndarray) -> np.ndarray:
    """Which pairs stay: those of a rank up to the bound of one of their queries. [n] bool"""
    return np.array([bool(q) and rank <= bounds[q].max() for rank, q in zip(ranks.tolist(), queries, strict=True)])


def by_query(ranks: np.ndarray, queries: Iterable[list[int]], bounds: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(query, the ranks of its pairs up to its bound, ascending)."""
    lists = list(queries)
    of_pairs = np.repeat(ranks, [len(q) for q in lists])
    of_queries = np.fromiter((i for q in lists for i in q), np.int64, len(of_pairs))
    chosen = of_pairs <= bounds[of_queries]
    of_pairs, of_queries = of_pairs[chosen], of_queries[chosen]
    order = np.lexsort((of_pairs, of_queries))
    found, starts = np.unique(of_queries[order], return_index=True)
    ends = [*starts[1:].tolist(), len(order)]
    for query, start, end in zip(found.tolist(), starts.tolist(), ends, strict=False):  # of no query, no end
        yield query, of_pairs[order[start:end]]


class Smallest(beam.CombineFn):
    """Arrays of ranks → the t smallest, ascending. Combined where they are found, before they travel."""

    def __init__(self, t: int):
        self._t = t

    def create_accumulator(self) -> list[np.ndarray]:
        return []

    def add_input(self, accumulator: list[np.ndarray], ranks: np.ndarray) -> list[np.ndarray]:
        accumulator.append(ranks[: self._t])
        return self._cut(accumulator) if sum(map(len, accumulator)) > 2 * self._t else accumulator

    def merge_accumulators(self, accumulators: Iterable[list[np.ndarray]]) -> list[np.ndarray]:
        merged: list[np.ndarray] = []
        for accumulator in accumulators:
            for ranks in accumulator:
                merged = self.add_input(merged, ranks)
        return merged

    def compact(self, accumulator: list[np.ndarray]) -> list[np.ndarray]:
        return self._cut(accumulator)

    def extract_output(self, accumulator: list[np.ndarray]) -> np.ndarray:
        return self._cut(accumulator)[0]

    def _cut(self, accumulator: list[np.ndarray]) -> list[np.ndarray]:
        return [np.sort(np.concatenate(accumulator or [np.zeros(0, np.int64)]))[: self._t]]
