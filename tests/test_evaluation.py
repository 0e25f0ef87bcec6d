"""Retrieval and zero-shot figures against the peers' own and by hand."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest
from conftest import ORACLES

from clip_jax.data.preprocess import Preprocess
from clip_jax.errors import DataError
from clip_jax.evaluation import retrieval, zero_shot
from clip_jax.evaluation.encoder import Encoder
from clip_jax.sharding import make_mesh

WAYS = {
    "image_to_text_": ("recall_i2t_stable", "paired_image_to_text"),
    "": ("recall_t2i_stable", "paired_text_to_image"),
}
RECALLS = [f"recall_at_{k}" for k in (1, 5, 10)]


def test_recall_is_the_peers_ties_and_all() -> None:
    inputs, expected = (np.load(ORACLES / "metrics" / f"{part}.npz") for part in ("inputs", "expected"))
    similarity, owner = inputs["similarity"], inputs["caption_owner"]
    # The scores as they are: products with the unit matrix. A few at once, so that the parts are uneven.
    figures = retrieval.both_ways(similarity, np.eye(len(owner), dtype=similarity.dtype), owner, scores_at_once=1000)
    for way, (key, _) in WAYS.items():
        np.testing.assert_allclose([figures[way + name] for name in RECALLS], expected[key], atol=1e-9)


def test_mean_and_median_ranks_are_the_peers() -> None:
    inputs, expected = (np.load(ORACLES / "metrics" / f"{part}.npz") for part in ("inputs", "expected"))
    figures = retrieval.both_ways(inputs["paired_image"], inputs["paired_text"], np.arange(37))
    for way, (_, key) in WAYS.items():
        got = [figures[way + name] for name in (*RECALLS, "mean_rank", "median_rank")]
        np.testing.assert_allclose(got, expected[key], atol=1e-9)


def test_the_median_of_an_even_number_is_cut_off() -> None:
    ranks = np.array([0, 1, 4, 9])
    assert retrieval.mean_rank(ranks) == 4.5
    assert retrieval.median_rank(ranks) == 3.0


@pytest.mark.parametrize("owner", [[0, 0, 1], [0, 1, 3], [-1, 1, 2]])
def test_an_image_without_caption_is_refused(owner: list[int]) -> None:
    with pytest.raises(DataError, match="expected each of the images 0 to 2, and no other"):
        retrieval.both_ways(np.eye(3), np.eye(3), np.array(owner))


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


def test_an_encoder_asks_before_every_batch_whether_to_go_on() -> None:
    asked: list[int] = []

    def between() -> None:
        asked.append(len(asked))
        if len(asked) == 5:
            raise KeyboardInterrupt

    encoder = Encoder(
        function=lambda params, state, batch: batch["text"],
        params={},
        state={},
        mesh=make_mesh({"fsdp": 1}, jax.devices()[:1]),
        preprocess=Preprocess(32),
        tokenize=lambda texts: np.zeros((len(texts), 4), np.int32),
        batch_size=8,
        between=between,
    )
    assert encoder.texts(["a"] * 17).shape == (17, 4) and asked == [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        encoder.texts(["a"] * 17)
