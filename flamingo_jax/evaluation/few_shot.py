"""What Flamingo says about pictures it never saw: answers and captions, with 0 and with 4 shots, and its losses.

Every figure stands beside what it would be with other images and with none: what a text alone scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data import transforms
from clip_jax.data.pipeline import Element
from clip_jax.data.sources import PairSource, open_source
from clip_jax.errors import RecordError
from flamingo_jax.data import questions
from flamingo_jax.data.documents import Document, Media, Shape, encode
from flamingo_jax.data.emoji import catalogue
from flamingo_jax.data.prompts import CAPTION, Shot, few_shot, question
from flamingo_jax.decoding.generate import make_generate
from flamingo_jax.evaluation.captioning import cider
from flamingo_jax.evaluation.statistics import bootstrap_interval
from flamingo_jax.training.flamingo_task import FlamingoTask

PyTree = Any
IMAGES = ("true", "shuffled", "no")


@dataclass(frozen=True)
class Responder:
    """A trained Flamingo that goes on with prompts; every process calls it alike and gets all the texts."""

    task: FlamingoTask
    variables: PyTree
    mesh: Mesh
    batch_size: int
    answer_tokens: int
    _generate: Callable[[PyTree, Mapping[str, jax.Array]], jax.Array] = field(init=False, repr=False)
    _losses: Callable[..., jax.Array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        task, everywhere = self.task, sharding.replicated(self.mesh)
        generate = make_generate(task.model, self.answer_tokens, task.end_id)

        def losses(variables: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
            each, mask = task.token_losses(variables, batch)
            return (each * mask).sum(axis=1) / mask.sum(axis=1)

        object.__setattr__(
            self, "_generate", jax.jit(lambda v, batch: generate(v, task.inputs(batch)), out_shardings=everywhere)
        )
        object.__setattr__(self, "_losses", jax.jit(losses, out_shardings=everywhere))

    def answers(self, prompts: Sequence[Document], shape: Shape) -> list[str]:
        """What is said after each prompt, up to the end of the chunk."""
        ids = self._map(lambda v, batch: self._generate(v, batch), self.variables, prompts, shape, left=True)
        return [self.task.tokenizer.decode(row[: [*row, self.task.end_id].index(self.task.end_id)]).strip() for row in ids.tolist()]

    def losses(self, documents: Sequence[Document], shape: Shape, *, gates: bool = True) -> np.ndarray:
        """The mean loss of each document's learned tokens; with `gates` off, of the language model alone. [len]."""
        variables = self.variables if gates else without_gates(self.variables)
        return self._map(self._losses, variables, documents, shape, left=False)

    def _map(
        self, function: Callable[..., jax.Array], variables: PyTree, documents: Sequence[Document], shape: Shape, left: bool
    ) -> np.ndarray:
        where = sharding.batch_sharding(self.mesh)
        rows = sharding.local_rows(where, self.batch_size)
        found = []
        for start in range(0, len(documents), self.batch_size):
            some = [min(start + int(row), len(documents) - 1) for row in rows]  # the last one fills the batch up
            batch = stack([
                encode(documents[i], self.task.tokenizer, shape, self.task.end_id, key=f"prompt {i}", left=left) for i in some
            ])  # fmt: skip
            found.append(np.asarray(function(variables, sharding.put_batch(batch, where, self.batch_size))))
        return np.concatenate(found)[: len(documents)]


def stack(elements: Sequence[Element]) -> Element:
    return {key: np.stack([element[key] for element in elements]) for key in elements[0]}


def without_gates(variables: PyTree) -> PyTree:
    """The same variables with every tanh gate at 0."""
    gated = variables["params"]["gated"]
    closed = {name: jax.numpy.zeros_like(gated[name]) for name in ("attention_gate", "mlp_gate")}
    return {**variables, "params": {**variables["params"], "gated": gated | closed}}


@dataclass(frozen=True)
class FewShot:
    """Figures of an evaluation, and examples of what was said."""

    answers: dict[str, Any]
    captions: dict[str, Any]
    loss: dict[str, Any]
    examples: list[dict[str, Any]]

    def headline(self) -> dict[str, float]:
        answers = {f"answers.{images}_images": self.answers[f"{images}_images"] for images in IMAGES}
        return answers | {f"loss.{key}": self.loss[key] for key in ("true", "shuffled", "gates_off")}


def evaluate(task: FlamingoTask, params: PyTree, state: PyTree, mesh: Mesh, count: int, captions: int = 0) -> FewShot:
    """`count` questions of each task and `captions` captions (0: as many as `count`) on the held-out source."""
    config = task.config.evaluation
    responder = Responder(task, {"params": params, **state}, mesh, config.batch_size, config.answer_tokens)
    pictures = Pictures(open_source(config.source), task.image_size)
    support = Pictures(open_source(config.support), task.image_size)
    return evaluate_pictures(
        responder, pictures, support, tuple(config.shots), count, captions or count, config.tokens_a_shot, task.config.seed
    )


class Pictures:
    """The records of a source that decode: their pixels, names, groups, keywords and main colours."""

    def __init__(self, source: PairSource, image_size: int):
        names, groups, colours = catalogue(source, image_size)
        self.records, self.media = [], []
        for i in range(len(source)):
            try:
                image = transforms.decode(source[i].image, source[i].key)
            except RecordError:
                continue
            self.records.append(i)
            self.media.append(Media(transforms.evaluation_image(image, image_size)[None]))
        self.names, self.groups, self.colours = ([values[i] for i in self.records] for values in (names, groups, colours))
        self.references = [[names[i], *source[i].keywords] for i in self.records]

    def ask(self, count: int, seed: int) -> list[questions.Asked]:
        return questions.ask(self.names, self.groups, self.colours, count, seed)


def evaluate_pictures(
    responder: Responder, pictures: Pictures, support: Pictures, shots: Sequence[int], count: int, captions: int,
    tokens: int, seed: int,
) -> FewShot:  # fmt: skip
    """See `evaluate`. The figures named after no number of shots are those of the most shots."""
    rng = np.random.default_rng(seed)
    asked = pictures.ask(count, seed)
    pool: dict[str, list[Shot]] = {}
    for a in support.ask(max(64, count), seed + 1):
        pool.setdefault(a.task, []).append(Shot(support.media[a.record], question(a.question), a.answer))
    pool["caption"] = [Shot(m, CAPTION, n) for m, n in zip(support.media, support.names, strict=True)]
    queries = [Shot(pictures.media[a.record], question(a.question), a.answer) for a in asked]
    tasks = [a.task for a in asked]
    captioned = rng.permutation(len(pictures.media))[:captions]
    caption_queries = [Shot(pictures.media[i], CAPTION, pictures.names[i]) for i in captioned]

    def prompts(queries: Sequence[Shot], tasks: Sequence[str], n: int) -> tuple[list[list[Shot]], Shape]:
        """The shots before each query. Without any, two that are text only tell what is asked for."""
        chosen = [[pool[task][i] for i in rng.permutation(len(pool[task]))[: n or 2]] for task in tasks]
        if n == 0:
            chosen = [[shot.without_media() for shot in some] for some in chosen]
        room = responder.task.shape(n + 1, tokens * (max(n, 2) + 1))
        return chosen, replace(room, frames=1)

    answers: dict[str, Any] = {"questions": len(asked), "chance": questions.chance(asked)}
    examples: dict[int, dict[str, Any]] = {}
    expected = np.array([a.answer for a in asked])
    answers["chance"]["all"] = float(np.mean([answers["chance"][task] for task in tasks]))
    for n in shots:
        before, shape = prompts(queries, tasks, n)
        right = {}
        for images in IMAGES:
            shown = with_images(queries, images, rng)
            hide = images == "no"
            documents = [
                few_shot([shot.without_media() if hide else shot for shot in some], query)
                for some, query in zip(before, shown, strict=True)
            ]
            said = responder.answers(documents, shape)
            right[images] = np.array([a == e for a, e in zip(said, expected, strict=True)], float)
            if images == "true":
                for i, a in enumerate(asked):
                    examples.setdefault(i, {"record": pictures.records[a.record], "task": a.task, "question": a.question,
                                            "answer": a.answer})[f"shots_{n}"] = said[i]  # fmt: skip
        figures: dict[str, Any] = {f"{images}_images": float(scores.mean()) for images, scores in right.items()}
        figures["interval"] = bootstrap_interval(right["true"], right["shuffled"], seed=seed)
        figures["interval_no_images"] = bootstrap_interval(right["true"], right["no"], seed=seed)
        figures["tasks"] = {
            task: {f"{images}_images": float(scores[np.array(tasks) == task].mean()) for images, scores in right.items()}
            for task in sorted(set(tasks))
        }
        answers[f"shots_{n}"] = figures
    most = max(shots)
    answers |= {key: answers[f"shots_{most}"][key] for key in (*(f"{i}_images" for i in IMAGES), "interval", "interval_no_images", "tasks")}
    answers["shots"] = most
    answers["difference_of_shots"] = answers[f"shots_{most}"]["true_images"] - answers[f"shots_{min(shots)}"]["true_images"]

    said_of: dict[str, Any] = {"captions": len(caption_queries)}
    references = [pictures.references[i] for i in captioned]
    caption_examples = [
        {"record": pictures.records[i], "task": "caption", "question": "", "answer": pictures.names[i]} for i in captioned
    ]
    for n in shots:
        before, shape = prompts(caption_queries, ["caption"] * len(caption_queries), n)
        for images in ("true", "shuffled"):
            shown = with_images(caption_queries, images, rng)
            said = responder.answers([few_shot(s, q) for s, q in zip(before, shown, strict=True)], shape)
            scores = caption_scores(said, references)
            said_of.setdefault(f"shots_{n}", {})[f"{images}_images"] = scores
            if images == "true":
                for example, text in zip(caption_examples, said, strict=True):
                    example[f"shots_{n}"] = text
        said_of[f"shots_{n}"] |= said_of[f"shots_{n}"]["true_images"]
    said_of["difference_of_shots"] = {
        key: said_of[f"shots_{most}"][key] - said_of[f"shots_{min(shots)}"][key] for key in ("cider", "named")
    }
    loss = document_losses(responder, [*queries, *caption_queries], tokens, rng, seed)
    return FewShot(answers, said_of, loss, [*examples.values(), *caption_examples])


def with_images(queries: Sequence[Shot], images: str, rng: np.random.Generator) -> list[Shot]:
    """The queries with their own images, each with another's, or with none."""
    if images == "no":
        return [query.without_media() for query in queries]
    if images == "true":
        return list(queries)
    order = rng.permutation(len(queries))
    other = np.empty(len(queries), int)
    other[order] = np.roll(order, 1)  # around one circle: nobody keeps their own
    return [replace(query, media=queries[i].media) for query, i in zip(queries, other, strict=True)]


def caption_scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """CIDEr, and the share of captions that are one of their references."""
    mean, _ = cider(said, references)
    named = [text.lower() in {r.lower() for r in some} for text, some in zip(said, references, strict=True)]
    return {"cider": float(mean), "named": float(np.mean(named))}


def document_losses(
    responder: Responder, queries: Sequence[Shot], tokens: int, rng: np.random.Generator, seed: int
) -> dict[str, Any]:
    """The loss on answers and captions: with the true images, with others', and with the gates closed."""
    shape = replace(responder.task.shape(1, tokens), frames=1)

    def losses(images: str, gates: bool = True) -> np.ndarray:
        return responder.losses([Document(shot.parts()) for shot in with_images(queries, images, rng)], shape, gates=gates)

    true, shuffled, closed = losses("true"), losses("shuffled"), losses("true", gates=False)
    return {
        "documents": len(queries),
        "true": float(true.mean()),
        "shuffled": float(shuffled.mean()),
        "gates_off": float(closed.mean()),
        "interval_shuffled": bootstrap_interval(shuffled, true, seed=seed),
        "interval_gates_off": bootstrap_interval(closed, true, seed=seed),
    }
