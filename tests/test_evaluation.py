"""Retrieval and zero-shot figures against the peers' own and by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
from conftest import ORACLES

from clip_jax.evaluation import retrieval, zero_shot


def test_recall_is_the_peers_ties_and_all() -> None:
    inputs, expected = (np.load(ORACLES / "metrics" / f"{part}.npz") for part in ("inputs", "expected"))
    similarity, owner = inputs["similarity"], inputs["caption_owner"]
    relevant = owner[None, :] == np.arange(len(similarity))[:, None]
    to_text = retrieval.first_ranks(similarity, relevant)
    to_image = retrieval.first_ranks(similarity.T, relevant.T)
    for i, k in enumerate((1, 5, 10)):
        assert retrieval.recall_at(to_text, k) == pytest.approx(expected["recall_i2t_stable"][i], abs=1e-9)
        assert retrieval.recall_at(to_image, k) == pytest.approx(expected["recall_t2i_stable"][i], abs=1e-9)


def test_mean_and_median_ranks_are_the_peers() -> None:
    inputs, expected = (np.load(ORACLES / "metrics" / f"{part}.npz") for part in ("inputs", "expected"))
    similarity = inputs["paired_image"] @ inputs["paired_text"].T
    for matrix, key in ((similarity, "paired_image_to_text"), (similarity.T, "paired_text_to_image")):
        ranks = retrieval.first_ranks(matrix, np.eye(len(matrix), dtype=bool))
        got = [retrieval.recall_at(ranks, k) for k in (1, 5, 10)]
        np.testing.assert_allclose(got, expected[key][:3], atol=1e-9)


def test_ties_go_to_the_lower_index() -> None:
    ranks = retrieval.first_ranks(np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]), np.array([[0, 1, 0], [0, 1, 0]], bool))
    assert ranks.tolist() == [1, 0]


def test_a_classs_prompts_are_normalised_averaged_and_normalised_again() -> None:
    vectors = {"a cat": [1.0, 0.0], "the cat": [0.6, 0.8], "a dog": [0.0, 1.0], "the dog": [0.0, 1.0]}

    def encode(texts: Sequence[str]) -> np.ndarray:
        return np.array([vectors[text] for text in texts])

    got = zero_shot.class_embeddings(encode, ["cat", "dog"], ("a {}", "the {}"))
    cat = np.array([0.8, 0.4])
    np.testing.assert_allclose(got, [cat / np.linalg.norm(cat), [0.0, 1.0]])


def test_accuracy_at_k() -> None:
    top = zero_shot.top_classes(np.eye(3)[[0, 1, 1]], np.eye(3), 2)
    assert top.tolist() == [[0, 1], [1, 0], [1, 0]]
    labels = np.array([0, 1, 0])
    assert zero_shot.accuracy(top, labels, 1) == pytest.approx(2 / 3)
    assert zero_shot.accuracy(top, labels, 2) == 1.0
