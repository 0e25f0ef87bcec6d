"""The linear probe on data sets whose results are known."""

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.datasets import load_iris

from clip_jax.errors import DataError
from clip_jax.evaluation.linear_probe import fit_predict, linear_probe, mean_per_class_accuracy

Split = tuple[np.ndarray, np.ndarray]


def blobs(count: int, seed: int, noise: float = 1.0, features: int = 8) -> Split:
    """Two normal clouds at ±1 along the first feature; the others say nothing."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    x = noise * rng.normal(size=(count, features))
    x[:, 0] += 2 * labels - 1
    return x, labels


def test_iris_scores_what_is_published() -> None:
    x, y = load_iris(return_X_y=True)
    predicted = fit_predict(x, y, x, 1.0, 1000)
    assert (predicted == y).sum() == 146  # scikit-learn's user guide: 0.97 on its training data


def test_the_objective_is_the_stated_one() -> None:
    x, y = blobs(40, 0, features=2)
    signs = 2.0 * y - 1

    def objective(w: np.ndarray, c: float) -> float:
        # Two classes as one logit z; scikit-learn regularises its single weight vector.
        return np.logaddexp(0, -signs * (x @ w[:2] + w[2])).sum() + w[:2] @ w[:2] / (2 * c)

    grid = np.random.default_rng(1).normal(size=(2000, 2)) * 3
    for c in (0.01, 1.0, 100.0):
        w = minimize(objective, np.zeros(3), args=(c,), tol=1e-10).x
        margin = grid @ w[:2] + w[2]
        sure = np.abs(margin) > 1e-3 * np.abs(margin).max()
        np.testing.assert_array_equal(fit_predict(x, y, grid, c, 1000)[sure], (margin > 0)[sure])


def test_the_probe_comes_near_the_best_possible() -> None:
    # Bayes' rule for clouds at ±1 with unit noise: Φ(1) = 84.13 %.
    probe = linear_probe(*blobs(1000, 0), blobs(500, 1), blobs(20000, 2))
    assert abs(probe.accuracy - 0.8413) < 0.01
    assert abs(probe.mean_per_class_accuracy - probe.accuracy) < 0.01


def test_the_sweep_narrows_about_the_best() -> None:
    probe = linear_probe(*blobs(30, 0, features=60), blobs(200, 1, features=60), blobs(500, 2, features=60))
    tried = [np.log10(c) for c, _ in probe.sweep]
    np.testing.assert_allclose(tried[:7], range(-6, 7, 2))
    assert len(set(np.round(tried, 6))) == len(tried) <= 7 + 2 * 4
    best = np.log10(probe.inverse_regularisation)
    near = min(abs(best - t) for t in tried if abs(t - best) > 1e-9)
    assert near <= 1 / 8 + 1e-9
    scores = dict(zip(np.round(tried, 6), (score for _, score in probe.sweep), strict=True))
    assert scores[np.round(best, 6)] == max(scores.values())


def test_mean_per_class_accuracy_weighs_classes_alike() -> None:
    labels = np.array([0] * 8 + [1] * 2)
    assert mean_per_class_accuracy(np.zeros(10, int), labels) == 0.5
    assert mean_per_class_accuracy(np.array([0] * 6 + [1] * 2 + [1, 0]), labels) == (6 / 8 + 1 / 2) / 2


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        (np.zeros((3, 8)), np.zeros(4), r"training split: features \(3, 8\) and labels \(4,\)"),
        (np.zeros((0, 8)), np.zeros(0), "N > 0"),
        (np.zeros((4, 7)), np.arange(4), r"validation split: features \(5, 8\)"),
        (np.full((4, 8), np.nan), np.arange(4), "no finite number"),
        (np.zeros((4, 8)), np.zeros(4), "one class only"),
    ],
)
def test_what_does_not_fit_is_refused(x: np.ndarray, y: np.ndarray, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        linear_probe(x, y, blobs(5, 0), blobs(5, 1))
