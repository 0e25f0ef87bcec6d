"""Retrieval: recall at k, mean and median rank, ties to the lower index (as a stable sort has them).

Dimension letters: Q queries, N images or candidates, M captions, K candidates, E width.
"""

import numpy as np

from clip_jax.errors import DataError
from clip_jax.evaluation.hosts import over_hosts, parts_of


def first_ranks(similarity_QxN: np.ndarray, relevant_QxN: np.ndarray) -> np.ndarray:
    """The 0-based rank of each query's best-placed relevant candidate. [Q] int.

    A candidate's rank counts those of a strictly higher score and those of an equal score that come earlier.
    """
    best_Qx1 = np.where(relevant_QxN, similarity_QxN, -np.inf).max(axis=1, keepdims=True)
    equal_QxN = similarity_QxN == best_Qx1
    first_Qx1 = (equal_QxN & relevant_QxN).argmax(axis=1)[:, None]
    earlier_QxN = equal_QxN & (np.arange(similarity_QxN.shape[1]) < first_Qx1)
    return (similarity_QxN > best_Qx1).sum(axis=1) + earlier_QxN.sum(axis=1)


def recall_at(ranks: np.ndarray, k: int) -> float:
    """The share of queries with a relevant candidate among the first k."""
    return float((ranks < k).mean())


def mean_rank(ranks: np.ndarray) -> float:
    """From 1, the best."""
    return float(ranks.mean()) + 1


def median_rank(ranks: np.ndarray) -> float:
    """From 1, the best; half of a rank is cut off, as open_clip reports it."""
    return float(np.floor(np.median(ranks))) + 1


def chance_of_recall(relevant_Q: np.ndarray, candidates: int, k: int) -> float:
    """What `recall_at` gives on average where the order is drawn: query q has relevant_Q[q] of the candidates."""
    missed_Q = np.ones(len(relevant_Q))
    for i in range(min(k, candidates)):
        missed_Q *= np.clip((candidates - relevant_Q - i) / (candidates - i), 0, None)
    return float(1 - missed_Q.mean())


def both_ways(
    image_NxE: np.ndarray, text_MxE: np.ndarray, owner_M: np.ndarray, scores_at_once: int = 2**24
) -> dict[str, float]:
    """Figures of N images against M captions, of which image `owner_M[m]` has the m-th; it may have several.

    `recall_at_k`, `mean_rank`, `median_rank`: text → image. The same after `image_to_text_`: an image is found
    by any of its captions. Scores are inner products; only `scores_at_once` of them are held, and the processes
    share out the work.

    Raises DataError where an image has no caption, or a caption no image.
    """
    images_N = np.arange(len(image_NxE))
    if not np.array_equal(np.unique(owner_M), images_N):
        raise DataError(f"captions' owners: expected each of the images 0 to {len(images_N) - 1}, and no other")
    figures: dict[str, float] = {}
    for way, queries, candidates in (
        ("", (text_MxE, owner_M), (image_NxE, images_N)),
        ("image_to_text_", (image_NxE, images_N), (text_MxE, owner_M)),
    ):
        ranks = _ranks(queries, candidates, max(1, scores_at_once // len(candidates[0])))
        figures |= {f"{way}recall_at_{k}": recall_at(ranks, k) for k in (1, 5, 10)}
        figures |= {f"{way}mean_rank": mean_rank(ranks), f"{way}median_rank": median_rank(ranks)}
    return figures


def _ranks(queries: tuple[np.ndarray, np.ndarray], candidates: tuple[np.ndarray, np.ndarray], rows: int) -> np.ndarray:
    """`first_ranks` of all queries, some rows at a time. Either: embeddings, and the image that each belongs to."""
    (query_QxE, image_Q), (candidate_KxE, image_K) = queries, candidates

    def compute(part: slice) -> np.ndarray:
        return first_ranks(query_QxE[part] @ candidate_KxE.T, image_Q[part, None] == image_K)

    return over_hosts(compute, parts_of(len(query_QxE), rows), len(query_QxE))
