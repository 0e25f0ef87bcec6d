"""How sure a difference of two mean scores is."""

from collections.abc import Sequence

import numpy as np

from clip_jax.errors import DataError

DRAWN_AT_ONCE = 1 << 22  # indices; of all resamples together there can be more than memory holds


def bootstrap_interval(
    scores: Sequence[float] | np.ndarray,
    others: Sequence[float] | np.ndarray,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> tuple[float, float]:
    """The percentile bootstrap's interval of mean(scores) − mean(others), both [N] and of the same items.

    Items are drawn with replacement, each with both its scores, so what is hard about an item cancels. Source:
    Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.

    Raises DataError where the lengths differ, there is no item, or a score is not finite.
    """
    a_N, b_N = np.asarray(scores, np.float64), np.asarray(others, np.float64)
    if a_N.ndim != 1 or a_N.shape != b_N.shape or not len(a_N):
        raise DataError(
            f"scores of shapes {a_N.shape} and {b_N.shape}: expected two of the same items, [N] and not empty"
        )
    difference_N = a_N - b_N
    if not np.isfinite(difference_N).all():
        raise DataError("scores that are not finite have no interval: expected numbers")
    N = len(difference_N)
    rng = np.random.default_rng(seed)
    rows = max(1, DRAWN_AT_ONCE // N)
    parts = (min(rows, resamples - start) for start in range(0, resamples, rows))
    means = np.concatenate([difference_N[rng.integers(N, size=(part, N))].mean(axis=1) for part in parts])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
