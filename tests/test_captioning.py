"""CIDEr-D, BLEU and the words they count against the reference implementation's.

The bootstrap's intervals against the normal ones.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import ORACLES

from clip_jax.errors import DataError
from flamingo_jax.evaluation.captioning import bleu, cider, coco_words
from flamingo_jax.evaluation.statistics import bootstrap_interval


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cider_is_the_reference_implementations() -> None:
    cases = json.loads((ORACLES / "metrics" / "texts.json").read_text())["cider"]
    expected = np.load(ORACLES / "metrics" / "expected.npz")
    mean, each = cider([case["candidate"] for case in cases], [case["references"] for case in cases])
    np.testing.assert_allclose(each, expected["cider_each"], atol=1e-9)
    assert mean == pytest.approx(float(expected["cider"]), abs=1e-9)


def test_cider_by_hand() -> None:
    """Two images of one reference each: a word of one image weighs log 2, one of both nothing."""
    mean, each = cider(["Red  cat", "a dog"], [["red cat"], ["dog a red"]])
    # The first is its reference but for case and blanks; there is no 3- or 4-gram, and "red" is in both images.
    assert each[0] == pytest.approx(10 * (1 + 1) / 4)
    # "dog" and "a" of the second's words, in another order, and a bigram less than the reference has.
    assert each[1] == pytest.approx(10 * 1 / 4 * np.exp(-1 / 72))
    assert mean == pytest.approx(each.mean())


def test_cider_without_candidates_or_references_is_refused() -> None:
    assert "0 candidates" in refusal(lambda: cider([], []))
    assert "1 candidates, 2 lists" in refusal(lambda: cider(["a"], [["a"], ["b"]]))
    assert "references 1: []" in refusal(lambda: cider(["a", "b"], [["a"], []]))
    assert "references 0: 'a'" in refusal(lambda: cider(["a"], ["a"]))


@pytest.fixture(scope="module")
def coco() -> dict[str, Any]:
    return json.loads((ORACLES / "coco_captions" / "expected.json").read_text())


def test_words_are_the_coco_evaluations(coco: dict[str, Any]) -> None:
    assert len(coco["words"]) == 31
    assert [coco_words(case["text"]) for case in coco["words"]] == [case["words"] for case in coco["words"]]


def test_bleu_is_the_reference_implementations(coco: dict[str, Any]) -> None:
    """It adds 1e-9 to every count, against divisions by zero; here there is none."""
    cases = json.loads((ORACLES / "metrics" / "texts.json").read_text())["cider"]
    got = bleu([case["candidate"] for case in cases], [case["references"] for case in cases])
    np.testing.assert_allclose(got, coco["bleu"], rtol=1e-9)
    raw = coco["raw"]
    said, references = map(coco_words, raw["candidates"]), [[coco_words(r) for r in some] for some in raw["references"]]
    candidates = list(said)
    np.testing.assert_allclose(bleu(candidates, references), raw["bleu"], rtol=1e-9)
    assert cider(candidates, references)[0] == pytest.approx(raw["cider"], rel=1e-9)


def test_bleu_by_hand() -> None:
    """Clipped counts, the closest length (the shorter of two), and no smoothing."""
    assert bleu(["the the the the"], [["the cat sat", "the the dog ran off"]])[0] == pytest.approx(2 / 4)
    assert bleu(["a b c"], [["a b c d e f"]]) == pytest.approx([np.exp(1 - 2)] * 3 + [0])
    assert bleu([""], [["a"]]) == (0, 0, 0, 0)
    assert "0 candidates" in refusal(lambda: bleu([], []))
    assert "references 0: []" in refusal(lambda: bleu(["a"], [[]]))


@pytest.fixture(scope="module")
def scores() -> tuple[np.ndarray, np.ndarray]:
    """800 items right or wrong, two answers to each that go together."""
    rng = np.random.default_rng(0)
    hard = rng.random(800)
    return (rng.random(800) < 0.3 + 0.6 * hard).astype(float), (rng.random(800) < 0.2 + 0.6 * hard).astype(float)


@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959964), (0.8, 1.281552)])
def test_interval_is_the_normal_one_of_many_items(
    scores: tuple[np.ndarray, np.ndarray], confidence: float, z: float
) -> None:
    difference = scores[0] - scores[1]
    error = difference.std() / np.sqrt(len(difference))
    low, high = bootstrap_interval(*scores, seed=3, confidence=confidence, resamples=20_000)
    # An end of the interval is itself drawn: its own standard error is about 0.02 of the mean's.
    assert low == pytest.approx(difference.mean() - z * error, abs=0.08 * error)
    assert high == pytest.approx(difference.mean() + z * error, abs=0.08 * error)


def test_interval_is_paired(scores: tuple[np.ndarray, np.ndarray]) -> None:
    assert bootstrap_interval(scores[0] + 0.25, scores[0], seed=0) == pytest.approx((0.25, 0.25))


def test_interval_depends_on_the_seed_alone(
    scores: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = (scores[0] * np.arange(800), scores[1])  # hardly two draws of the same mean
    first = bootstrap_interval(*scores, seed=1)
    assert bootstrap_interval(*scores, seed=1) == first != bootstrap_interval(*scores, seed=2)
    monkeypatch.setattr("flamingo_jax.evaluation.statistics.DRAWN_AT_ONCE", 100_000)  # in many parts, not in one
    assert bootstrap_interval(*scores, seed=1) == first


def test_interval_of_what_has_none_is_refused() -> None:
    assert "(2,) and (3,)" in refusal(lambda: bootstrap_interval([1, 2], [1, 2, 3], seed=0))
    assert "(0,)" in refusal(lambda: bootstrap_interval([], [], seed=0))
    assert "not finite" in refusal(lambda: bootstrap_interval([1.0, np.nan], [1.0, 1.0], seed=0))
