"""Retrieval: recall at k, mean and median rank, ties to the lower index (as a stable sort has them)."""

import numpy as np


def first_ranks(similarity_QxN: np.ndarray, relevant_QxN: np.ndarray) -> np.ndarray:
    """The 0-based rank of each query's best-placed relevant candidate. [Q] int.

    A candidate's rank counts those of a strictly higher score and those of an equal score that come earlier.
    """
    order = np.argsort(-similarity_QxN, axis=1, kind="stable")
    return np.take_along_axis(relevant_QxN, order, axis=1).argmax(axis=1)


def recall_at(ranks: np.ndarray, k: int) -> float:
    """The share of queries with a relevant candidate among the first k."""
    return float((ranks < k).mean())
