"""Close-ended tasks: the class whose text is most likely after the prompt. N records, P prompts of each, C classes."""

from collections.abc import Sequence

import numpy as np

from clip_jax.errors import ConfigError, DataError


def ensembled(log_likelihoods_NxPxC: np.ndarray) -> np.ndarray:
    """Over the prompts, such as permutations of the shots, the mean of the log-likelihoods. [N, C]."""
    return np.asarray(log_likelihoods_NxPxC, np.float64).mean(axis=1)


def log_odds(log_likelihoods_NxC: np.ndarray) -> np.ndarray:
    """Of the second of two classes against the first. [N]."""
    return log_likelihoods_NxC[:, 1] - log_likelihoods_NxC[:, 0]


def roc_auc(scores: Sequence[float] | np.ndarray, positive: Sequence[bool] | np.ndarray) -> float:
    """The area under the ROC curve: how often a positive scores above a negative, ties counting half.

    Raises DataError where all are positive or none is, or a score is not finite.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError:
        raise ConfigError("the area under the ROC curve needs the extra `evaluation` (scikit-learn)") from None
    scores_N, positive_N = np.asarray(scores, np.float64), np.asarray(positive, bool)
    if positive_N.all() or not positive_N.any():
        raise DataError(f"{int(positive_N.sum())} of {len(positive_N)} records are positive: expected some, not all")
    if not np.isfinite(scores_N).all():
        raise DataError("scores that are not finite have no order: expected numbers")
    return float(roc_auc_score(positive_N, scores_N))
