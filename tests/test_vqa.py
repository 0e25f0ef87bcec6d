"""VQA accuracy and its normalisation against the official evaluation's figures."""

import json
from typing import Any

import numpy as np
import pytest
from conftest import ORACLES

from clip_jax.errors import DataError
from flamingo_jax.evaluation.vqa import exact_match, first_answer, normalise, vqa_accuracy


@pytest.fixture(scope="module")
def texts() -> dict[str, Any]:
    return json.loads((ORACLES / "metrics" / "texts.json").read_text())


@pytest.fixture(scope="module")
def expected() -> Any:
    return np.load(ORACLES / "metrics" / "expected.npz")


def test_accuracy_is_the_peers(texts: dict[str, Any], expected: Any) -> None:
    predictions, answers = ([case[key] for case in texts["vqa"]] for key in ("prediction", "answers"))
    got = vqa_accuracy(predictions, answers)
    np.testing.assert_allclose(100 * got, expected["vqa_each"], atol=1e-6)
    assert 100 * got.mean() == pytest.approx(float(expected["vqa_overall"]), abs=1e-6)


def test_normalised_answers_are_the_peers(texts: dict[str, Any], expected: Any) -> None:
    assert [normalise(case["prediction"]) for case in texts["vqa"]] == expected["vqa_normalised"].tolist()


def test_first_answers_are_the_peers(texts: dict[str, Any], expected: Any) -> None:
    assert [first_answer(text) for text in texts["generations"]] == expected["postprocessed"].tolist()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Dog", "dog"),
        ("Zero", "0"),
        ("yall'd've", "y'all'd've"),
        ("couldnt've", "couldn't've"),
        ("she's", "she's"),
        ("somebody'd", "somebodyd"),
        ("wait...what.", "waitwhat"),
        ("$3.50", "$3.50"),
        ("red/blue", "red blue"),
        ("red /blue", "red blue"),
        ("1,000-2,000", "10002000"),
    ],
)
def test_normalisation(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_accuracy_by_the_number_of_people_who_agree(matches: int, accuracy: float) -> None:
    """Leaving one out of the ten: m of them see m − 1 others who agree, 10 − m see m."""
    answers = ["cat"] * matches + ["dog"] * (10 - matches)
    assert vqa_accuracy(["a cat"], [answers]) == pytest.approx([accuracy])


def test_exact_match_is_normalised() -> None:
    assert exact_match(["The two cats.", "dog", ""], ["2 cats", "dogs", "the"]).tolist() == [1.0, 0.0, 1.0]
    assert exact_match(["a cat", "cow"], [["dog", "Cat!"], ["dog", "cat"]]).tolist() == [1.0, 0.0]


def test_other_numbers_of_answers_are_refused() -> None:
    with pytest.raises(DataError, match="1 predictions and the answers of 2 questions"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(DataError, match="2 predictions and the answers of 1 questions"):
        vqa_accuracy(["a", "b"], [["a", "b"]])
    with pytest.raises(DataError, match=r"answers 1: \['a'\]; expected a list of at least two"):
        vqa_accuracy(["a", "b"], [["a", "b"], ["a"]])
    with pytest.raises(DataError, match="answers 0: 'yes'"):
        vqa_accuracy(["a"], ["yes"])
