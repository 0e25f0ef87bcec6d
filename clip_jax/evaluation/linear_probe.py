"""Linear probe: how well a linear classifier on frozen features does (arXiv 2103.00020, appendix A.3).

Dimension letters: N examples, D features, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from clip_jax.errors import ConfigError, DataError
from clip_jax.evaluation.hosts import over_hosts, parts_of
from clip_jax.progress import brief

COARSE = tuple(float(e) for e in range(-6, 7, 2))  # powers of ten of the inverse regularisation, tried first
FINEST = 1 / 8  # of a power of ten: the paper's 96 values


@dataclass(frozen=True)
class Probe:
    """What a probe scored on the test set, and how its regularisation was found.

    `mean_per_class_accuracy` weighs all classes alike, however many examples they have; those without any are
    left out. `sweep`: (inverse regularisation, accuracy on the validation split), in the order tried.
    """

    inverse_regularisation: float
    accuracy: float
    mean_per_class_accuracy: float
    sweep: tuple[tuple[float, float], ...]


def linear_probe(
    features_NxD: np.ndarray,
    labels_N: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    exponents: Sequence[float] = COARSE,
    finest: float = FINEST,
    max_iterations: int = 1000,
) -> Probe:
    """Multinomial logistic regression by L-BFGS, without augmentation; needs the extra `evaluation`.

    The regularisation is swept on the validation split: coarsely, then at half the distance about the best one
    until `finest`; the processes share out these fits. The probe that is scored is fitted to the training and the
    validation split together.

    Args:
      features_NxD: training features, of any model, as they are (CLIP's are taken before the projection).
      labels_N: their classes, integers.
      validation: (features, labels) of the validation split.
      test: (features, labels) of the test split.
      exponents: powers of ten of the inverse regularisation to try first, ascending.
      finest: the distance of exponents at which the sweep ends.
      max_iterations: of L-BFGS.

    Raises:
      DataError: features and labels that do not fit each other, a single class, or a feature that is no number.
      ConfigError: scikit-learn is missing.
    """
    for name, (x, y) in {"training": (features_NxD, labels_N), "validation": validation, "test": test}.items():
        if x.ndim != 2 or len(x) != len(y) or len(x) == 0 or x.shape[1] != features_NxD.shape[-1]:
            raise DataError(f"{name} split: features {x.shape} and labels {y.shape}; expected [N, D] and [N], N > 0")
        if not np.isfinite(x).all():
            raise DataError(f"{name} split: a feature is no finite number")
    if len(np.unique(labels_N)) < 2:
        raise DataError("training split: one class only; expected at least two")

    sweep: dict[float, float] = {}
    step = (exponents[1] - exponents[0]) / 2 if len(exponents) > 1 else 0.0
    halvings = 0
    while step / 2**halvings >= finest:
        halvings += 1

    def try_all(asked: Sequence[float], bar: tqdm, end: int) -> None:
        """`end`: where the bar stands then, whoever made the fits and however many there were."""
        new = [exponent for exponent in asked if exponent not in sweep]

        def right(part: slice) -> np.ndarray:
            inverse = 10 ** new[part.start]
            predicted = fit_predict(features_NxD, labels_N, validation[0], inverse, max_iterations)
            bar.update()
            return np.sum(predicted == validation[1])

        counts = over_hosts(right, parts_of(len(new), 1), len(new))
        sweep.update(zip(new, (counts / len(validation[1])).tolist(), strict=True))
        bar.update(end - bar.n)

    with brief(total=len(exponents) + 2 * halvings + 1, desc="probe", unit="fit") as bar:
        try_all(exponents, bar, len(exponents))
        best = max(exponents, key=sweep.__getitem__)
        for done in range(halvings):
            inside = [e for e in (best - step, best, best + step) if exponents[0] <= e <= exponents[-1]]
            try_all(inside, bar, len(exponents) + 2 * (done + 1))
            best, step = max(inside, key=lambda e: (sweep[e], e == best)), step / 2
        both = np.concatenate([features_NxD, validation[0]]), np.concatenate([labels_N, validation[1]])
        predicted = fit_predict(*both, test[0], 10**best, max_iterations)
    return Probe(
        inverse_regularisation=10**best,
        accuracy=accuracy(predicted, test[1]),
        mean_per_class_accuracy=mean_per_class_accuracy(predicted, test[1]),
        sweep=tuple((10**exponent, found) for exponent, found in sweep.items()),
    )


def fit_predict(
    features_NxD: np.ndarray, labels_N: np.ndarray, asked: np.ndarray, inverse_regularisation: float, iterations: int
) -> np.ndarray:
    """Classes of `asked`, by the W, b that minimise Σ cross-entropy + ‖W‖² / (2 · inverse_regularisation)."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ConfigError("a linear probe needs the extra `evaluation` (scikit-learn)") from None
    model = LogisticRegression(C=inverse_regularisation, max_iter=iterations, solver="lbfgs")
    return model.fit(features_NxD, labels_N).predict(asked)


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float((predicted == labels).mean())


def mean_per_class_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    return float(np.mean([(predicted[labels == c] == c).mean() for c in np.unique(labels)]))
