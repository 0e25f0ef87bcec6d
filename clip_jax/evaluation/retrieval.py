"""Retrieval: recall at k, mean and median rank, ties to the lower index (as a stable sort has them)."""

import numpy as np

from clip_jax.errors import DataError


def first_ranks(similarity_QxN: np.ndarray, relevant_QxN: np.ndarray) -> np.ndarray:
    """The 0-based rank of each query's best-placed relevant candidate. [Q] int.

    A candidate's rank counts those of a strictly higher score and those of an equal score that come earlier.
    """
    order = np.argsort(-similarity_QxN, axis=1, kind="stable")
    return np.take_along_axis(relevant_QxN, order, axis=1).argmax(axis=1)


def recall_at(ranks: np.ndarray, k: int) -> float:
    """The share of queries with a relevant candidate among the first k."""
    return float((ranks < k).mean())


def mean_rank(ranks: np.ndarray) -> float:
    """From 1, the best."""
    return float(ranks.mean()) + 1


def median_rank(ranks: np.ndarray) -> float:
    """From 1, the best; half of a rank is cut off, as open_clip reports it."""
    return float(np.floor(np.median(ranks))) + 1


def both_ways(similarity_NxM: np.ndarray, owner_M: np.ndarray) -> dict[str, float]:
    """Figures of N images against M captions, of which image `owner_M[m]` has the m-th; it may have several.

    `recall_at_k`, `mean_rank`, `median_rank`: text → image. The same after `image_to_text_`: an image is found
    by any of its captions.

    Raises DataError where an image has no caption, or a caption no image.
    """
    relevant_NxM = np.arange(len(similarity_NxM))[:, None] == owner_M
    if not (relevant_NxM.any(axis=1).all() and relevant_NxM.any(axis=0).all()):
        raise DataError(f"captions' owners: expected each of the images 0 to {len(similarity_NxM) - 1}, and no other")
    figures: dict[str, float] = {}
    for way, ranks in (
        ("", first_ranks(similarity_NxM.T, relevant_NxM.T)),
        ("image_to_text_", first_ranks(similarity_NxM, relevant_NxM)),
    ):
        figures |= {f"{way}recall_at_{k}": recall_at(ranks, k) for k in (1, 5, 10)}
        figures |= {f"{way}mean_rank": mean_rank(ranks), f"{way}median_rank": median_rank(ranks)}
    return figures
