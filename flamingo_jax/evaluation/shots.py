"""Which examples of a support set stand before a query, and in which order (arXiv 2204.14198 §4, appendix B.1.5).

Dimension letters: Q queries, S support examples, E embedding width, K shots. Pure functions of their seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from clip_jax.errors import DataError

TEXT_SHOTS = 2  # examples without images that stand before a query where it has no shots
PERMUTATIONS = 6  # of the shots, over which the likelihoods of a close-ended task are averaged


@dataclass(frozen=True)
class Selector:
    """Chooses among support examples by their images, never one with the query's own image.

    `images`: of the support set [S]. `embeddings`: of unit length, by image: then the most similar are taken, the
    most similar last (RICES); without, they are drawn at random, anew for each query.
    """

    images: Sequence[Path]
    seed: int
    embeddings: Mapping[Path, np.ndarray] | None = None

    def __call__(self, query: int, image: Path, shots: int) -> list[int]:
        """Indices [K] for the query at that place of its benchmark. Raises DataError where there are too few."""
        rng = np.random.default_rng([self.seed, shots, query])
        if self.embeddings is None or shots == 0:
            order = rng.permutation(len(self.images))[: (shots or TEXT_SHOTS) + self.images.count(image)]
        else:
            order = most_similar(self.embeddings[image], self._support_rows)
        chosen = [int(i) for i in order if self.images[i] != image][: shots or TEXT_SHOTS]
        if len(chosen) < (shots or TEXT_SHOTS):
            raise DataError(
                f"{image}: {shots or TEXT_SHOTS} shots; the support set has {len(chosen)} examples with other images"
            )
        return chosen[::-1]

    @cached_property
    def _support_rows(self) -> np.ndarray:
        return np.stack([(self.embeddings or {})[image] for image in self.images])


def most_similar(query_E: np.ndarray, support_SxE: np.ndarray) -> np.ndarray:
    """All of the support set, most similar first, ties to the lower index. [S] int."""
    return np.argsort(-(support_SxE @ query_E), kind="stable")


def permutations(shots: int, count: int, seed: Sequence[int]) -> list[np.ndarray]:
    """`count` orders of so many shots, all different where there are as many; the given one is the first."""
    rng = np.random.default_rng(list(seed))
    found = [tuple(range(shots))]
    while len(found) < min(count, math.factorial(shots)):
        order = tuple(int(i) for i in rng.permutation(shots))
        if order not in found:
            found.append(order)
    return [np.array(order, int) for order in found]
