"""The few-shot evaluation: who keeps which images, how figures come together, and a model that really looks."""

import json
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from clip_jax import sharding
from clip_jax.data.sources import open_source
from clip_jax.evaluation.encoder import nothing
from clip_jax.losses.next_token import next_token_losses
from flamingo_jax.data.documents import Document, Media, Shape, Text, length
from flamingo_jax.data.prompts import Shot
from flamingo_jax.data.tokenizer import TextTokenizer, open_tokenizer
from flamingo_jax.evaluation import few_shot
from flamingo_jax.evaluation.few_shot import Pictures, Prompts, Responder, caption_scores, spread, with_images

SIZE = 16


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return open_tokenizer("wordnet/tokenizer.json")


@pytest.fixture(scope="module")
def pictures() -> Pictures:
    return Pictures(open_source("emoji:unseen_concepts_held_out_style"), SIZE)


def test_shuffled_images_are_anothers_and_all_are_used() -> None:
    queries = [Shot(Media(np.full((1, 2, 2, 3), i, np.uint8)), "p", "a") for i in range(50)]
    shown = [int(shot.media.frames[0, 0, 0, 0]) for shot in with_images(queries, "shuffled", 0) if shot.media]
    assert sorted(shown) == list(range(50)) and all(i != j for i, j in enumerate(shown))
    assert with_images(queries, "true", 0) == queries
    assert all(shot.media is None and shot.prompt == "p" for shot in with_images(queries, "no", 0))


@pytest.mark.parametrize("shots", [0, 4])
def test_prompts_have_room_and_no_answer(shots: int, pictures: Pictures, tokenizer: TextTokenizer) -> None:
    prompts = Prompts(pictures, tokenizer, 30, {"shot": 32, "query": 48}, 0)
    asked = pictures.ask(30, 5)
    queries, tasks = [pictures.shot(a) for a in asked], [a.task for a in asked]
    documents = prompts(queries, tasks, shots)
    shape = prompts.shape(shots, SIZE)
    for document, query, task in zip(documents, queries, tasks, strict=True):
        assert len(document.media) == shots + 1 == shape.images and document.media[-1] is query.media
        assert 1 + length(document.parts, tokenizer) <= shape.tokens
        texts = [part.text for part in document.parts if hasattr(part, "text")]
        assert texts[-1] == query.prompt
        if task != "which":
            assert texts.count(query.prompt) == 1 + (shots or 2)  # shots of the same task
    again = prompts(queries, tasks, shots)
    assert all(list(a.parts) == list(b.parts) for a, b in zip(documents, again, strict=True))
    blind = prompts(with_images(queries, "no", 0), tasks, shots)
    assert not any(document.media for document in blind)


class Oracle:
    """Says what it is told of each query; knows how often each condition was asked."""

    def __init__(self, right_with_images: float):
        self.rate, self.rng = right_with_images, np.random.default_rng(0)
        self.task = type("Task", (), {"image_size": SIZE})()
        self.expected: list[str] = []
        self.own: list[int] = []  # which image belongs to each query

    def answers(self, documents: Any, shape: Any) -> list[str]:
        said: list[str] = []
        for document, expected in zip(documents, self.expected, strict=True):
            sees = bool(document.media) and id(document.media[-1]) == self.own[len(said)]
            said.append(expected if sees and self.rng.random() < self.rate else "nothing")
        return said


def test_figures_of_an_oracle(pictures: Pictures, tokenizer: TextTokenizer) -> None:
    """A model that answers rightly in 60 % of the cases where it is shown the right image."""
    asked = pictures.ask(100, 0)
    oracle = Oracle(0.6)
    oracle.expected = [a.answer for a in asked]
    oracle.own = [id(pictures.media[a.record]) for a in asked]
    prompts = Prompts(pictures, tokenizer, 30, {"shot": 32, "query": 48}, 0)
    run = few_shot._Run(oracle, pictures, prompts, (0, 4), 0)  # type: ignore[arg-type]
    figures, examples = run.answers(asked)
    n = len(asked)
    assert figures["questions"] == n and figures["shots"] == 4
    for shots in ("shots_0", "shots_4"):
        f = figures[shots]
        assert abs(f["true_images"] - 0.6) < 0.1 and f["no_images"] == 0
        assert f["shuffled_images"] < 0.02  # one record may be asked about twice
        low, high = f["interval"]
        assert low < f["true_images"] - f["shuffled_images"] < high and 0.05 < high - low < 0.25
        by_task = sum(f["tasks"][a.task]["true_images"] for a in asked) / n
        assert abs(by_task - f["true_images"]) < 1e-9
    assert figures["true_images"] == figures["shots_4"]["true_images"]
    assert figures["difference_of_shots"] == figures["shots_4"]["true_images"] - figures["shots_0"]["true_images"]
    assert [e["answer"] for e in examples] == oracle.expected and {"shots_0", "shots_4"} <= examples[0].keys()
    json.dumps([figures, examples])


def test_captions_count_as_named_by_any_of_their_references() -> None:
    scores = caption_scores(["red apple", "Fruit", "car"], [["red apple", "fruit"], ["apple", "fruit"], ["boat"]])
    assert scores["named"] == pytest.approx(2 / 3) and scores["cider"] > 0


def test_examples_are_spread_over_the_tasks() -> None:
    examples = [{"task": task, "i": i} for task in ("a", "b") for i in range(100)]
    chosen = spread(examples, 5)
    assert [e["i"] for e in chosen] == [0, 20, 40, 60, 80] * 2


def test_losses_of_a_language_model_by_hand() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 5, 7))
    text = np.random.default_rng(1).integers(0, 7, (2, 5))
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = [[-np.log(p[b, t, text[b, t + 1]]) for t in range(4)] for b in range(2)]
    np.testing.assert_allclose(next_token_losses(jnp.float32(logits), jnp.asarray(text)), expected, rtol=1e-5)


def test_answers_are_generated_from_each_blocks_own_parameters(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not from stacked ones, of which every call would copy all blocks."""
    said = tokenizer.encode("a dog")

    def generate(model: Any, variables: Any, batch: Any, *, max_new_tokens: int, stop_ids: Any) -> Any:
        blocks = variables["params"]["language_model"]["blocks"]
        assert [block["w"].shape for block in blocks] == [(3,), (3,)]
        rows = jnp.broadcast_to(jnp.array([*said, stop_ids[0]]), (len(batch["text"]), len(said) + 1))
        return SimpleNamespace(tokens=rows + blocks[1]["w"].sum().astype(int))

    monkeypatch.setattr(few_shot, "generate", generate)
    task: Any = SimpleNamespace(
        model=None, end_id=tokenizer.vocab_size, tokenizer=tokenizer, inputs=lambda batch: batch
    )
    variables = {"params": {"language_model": {"blocks": {"w": jnp.zeros((2, 3))}}}}
    mesh = sharding.make_mesh()
    responder = Responder(task, variables, mesh, mesh.size, len(said) + 1, tqdm(disable=True), nothing)
    assert responder.answers([Document([Text("what?")])], Shape(1, 1, 8, 16)) == ["a dog"]
