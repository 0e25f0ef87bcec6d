"""Which record stands at which position of training: a pure function of (seed, position), without memory.

A position counts the examples that training has drawn from a source: step s of batch size B draws the
positions s·B … s·B + B - 1. An epoch is a keyed permutation of the records.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 8  # with 4 (Grain's shuffle) neighbours stay visibly correlated


def mix(*values: int, after: int = 0) -> int:
    """A well-mixed 64-bit hash of integers (the finaliser of SplitMix64 over each in turn).

    `after`: the hash of what stood before them, so that `mix(c, after=mix(a, b))` is `mix(a, b, c)`.
    """
    h = after
    for value in values:
        h = (h + value + 0x9E3779B97F4A7C15) & _MASK
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & _MASK
        h ^= h >> 31
    return h


@lru_cache(maxsize=64)
def _rounds(key: int) -> tuple[int, ...]:
    return tuple(mix(key, r) for r in range(_ROUNDS))


def permute(index: int, n: int, key: int) -> int:
    """The image of `index` under a permutation of range(n) drawn by `key`.

    A Feistel network on the smallest even number of bits that holds n; what falls outside is walked on.
    """
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low, rounds = (1 << half) - 1, _rounds(key)
    while True:
        left, right = index >> half, index & low
        for begun in rounds:
            left, right = right, left ^ (mix(right, after=begun) & low)
        index = left << half | right
        if index < n:
            return index


@dataclass(frozen=True)
class Order:
    """Draws record indices: every record once an epoch or, with `groups`, one record of every group.

    Groups keep records of one name out of each other's batch, where they would count as negatives.
    """

    size: int
    seed: int
    groups: Sequence[Sequence[int]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.epoch_size < 1:
            raise ValueError("an empty source: expected at least one record")

    @property
    def epoch_size(self) -> int:
        return self.size if self.groups is None else len(self.groups)

    def index(self, position: int, attempt: int = 0) -> int:
        """The record at a position; attempt k > 0 names the k-th replacement, should that one be bad."""
        epoch, place = divmod(position, self.epoch_size)
        if attempt:
            place = mix(self.seed, position, attempt) % self.epoch_size
        else:
            place = permute(place, self.epoch_size, mix(self.seed, epoch))
        if self.groups is None:
            return place
        group = self.groups[place]
        return group[mix(self.seed, position, attempt, 1) % len(group)]


def group_by(keys: Sequence[Hashable]) -> list[list[int]]:
    """Indices of equal keys together, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def generator(*key: int) -> np.random.Generator:
    """A random generator that is a function of its key only (position, seed, …)."""
    return np.random.Generator(np.random.Philox(key=mix(*key)))
