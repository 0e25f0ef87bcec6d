"""What Flamingo says about pictures it never saw: answers and captions, with 0 and with 4 shots, and its losses.

Every figure stands beside what it would be with other images and with none: what a text alone scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from clip_jax import sharding
from clip_jax.data import transforms
from clip_jax.data.pipeline import Element
from clip_jax.data.sources import PairSource, open_source
from clip_jax.errors import RecordError
from clip_jax.evaluation.encoder import nothing
from flamingo_jax.data import questions
from flamingo_jax.data.documents import Document, Media, Shape, encode, length
from flamingo_jax.data.emoji import catalogue
from flamingo_jax.data.prompts import CAPTION, Shot, few_shot, question
from flamingo_jax.data.tokenizer import TextTokenizer
from flamingo_jax.decoding import generate, unstack
from flamingo_jax.evaluation.captioning import cider
from flamingo_jax.evaluation.statistics import bootstrap_interval
from flamingo_jax.evaluation.vqa import exact_match
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
    bar: tqdm
    between: Callable[[], None]
    _unstacked: PyTree = field(init=False, repr=False)
    _generate: Callable[[PyTree, Mapping[str, jax.Array]], jax.Array] = field(init=False, repr=False)
    _losses: Callable[..., jax.Array] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        task, everywhere = self.task, sharding.replicated(self.mesh)

        def answers(variables: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
            new, stop_ids = self.answer_tokens, (task.end_id,)
            return generate(task.model, variables, task.inputs(batch), max_new_tokens=new, stop_ids=stop_ids).tokens

        def losses(variables: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
            each, mask = task.token_losses(variables, batch)
            return (each * mask).sum(axis=1) / mask.sum(axis=1)

        object.__setattr__(self, "_unstacked", unstack(self.variables))
        object.__setattr__(self, "_generate", jax.jit(answers, out_shardings=everywhere))
        object.__setattr__(self, "_losses", jax.jit(losses, out_shardings=everywhere))

    def answers(self, prompts: Sequence[Document], shape: Shape) -> list[str]:
        """What is said after each prompt, up to the end of the chunk."""
        ids = self._map(lambda v, batch: self._generate(v, batch), self._unstacked, prompts, shape, left=True)
        return [
            self.task.tokenizer.decode(row[: [*row, self.task.end_id].index(self.task.end_id)]).strip()
            for row in ids.tolist()
        ]

    def losses(self, documents: Sequence[Document], shape: Shape, *, gates: bool = True) -> np.ndarray:
        """The mean loss of each document's learned tokens; with `gates` off, of the language model alone. [len]."""
        variables = self.variables if gates else without_gates(self.variables)
        return self._map(self._losses, variables, documents, shape, left=False)

    def _map(
        self,
        function: Callable[..., jax.Array],
        variables: PyTree,
        documents: Sequence[Document],
        shape: Shape,
        left: bool,
    ) -> np.ndarray:
        where = sharding.batch_sharding(self.mesh)
        rows = sharding.local_rows(where, self.batch_size)
        found = []
        for start in range(0, len(documents), self.batch_size):
            some = [min(start + int(row), len(documents) - 1) for row in rows]  # the last one fills the batch up
            tokenizer, end_id = self.task.tokenizer, self.task.end_id
            batch = stack([encode(documents[i], tokenizer, shape, end_id, key=f"prompt {i}", left=left) for i in some])
            self.between()
            self.bar.update()
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


def evaluate(
    task: FlamingoTask,
    params: PyTree,
    state: PyTree,
    mesh: Mesh,
    count: int,
    captions: int,
    between: Callable[[], None] = nothing,
) -> FewShot:
    """`count` questions of each task and `captions` captions on the config's held-out source.

    `between` is called before every batch.
    """
    config, seed = task.config.evaluation, task.config.seed
    pictures = Pictures(open_source(config.source), task.image_size)
    support = Pictures(open_source(config.support), task.image_size)
    asked = pictures.ask(count, seed)
    captioned = np.random.default_rng(seed).permutation(len(pictures.media))[:captions]
    sizes = len(config.shots) * (3 * [len(asked)] + 2 * [len(captioned)]) + 3 * [len(asked) + len(captioned)]
    total = sum(-(-size // config.batch_size) for size in sizes)
    variables = task.variables(params, state)
    with tqdm(
        total=total, desc="evaluate", unit="batch", dynamic_ncols=True, leave=None,  # below a trainer's bar it goes
        disable=jax.process_index() > 0 or None,
    ) as bar:  # fmt: skip
        responder = Responder(task, variables, mesh, config.batch_size, config.answer_tokens, bar, between)
        run = _Run(
            responder, pictures, Prompts(support, task.tokenizer, count, config.tokens, seed), tuple(config.shots), seed
        )
        answers, said = run.answers(asked)
        scores, captioned_as = run.captions(captioned)
        return FewShot(answers, scores, run.losses(asked, captioned), [*said, *captioned_as])


def spread(examples: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Evenly chosen ones, `count` of each task, captions last."""
    chosen: list[dict[str, Any]] = []
    for task in sorted({example["task"] for example in examples}, key=lambda task: (task == "caption", task)):
        some = [example for example in examples if example["task"] == task]
        chosen += some[:: max(1, len(some) // count)][:count]
    return chosen


class Pictures:
    """The records of a source that decode: their pixels, names, groups, keywords and main colours."""

    def __init__(self, source: PairSource, image_size: int):
        names, groups, colours = catalogue(source, image_size)
        self.records: list[int] = []
        self.media: list[Media] = []
        for i in range(len(source)):
            try:
                image = transforms.decode(source[i].image, source[i].key)
            except RecordError:
                continue
            self.records.append(i)
            self.media.append(Media(transforms.evaluation_image(image, image_size)[None]))
        self.names = [names[i] for i in self.records]
        self.groups = [groups[i] for i in self.records]
        self.colours = [colours[i] for i in self.records]
        self.references = [[names[i], *source[i].keywords] for i in self.records]

    def ask(self, count: int, seed: int) -> list[questions.Asked]:
        return questions.ask(self.groups, self.colours, count, seed)

    def shot(self, asked: questions.Asked) -> Shot:
        return Shot(self.media[asked.record], question(asked.question), asked.answer)

    def caption(self, i: int) -> Shot:
        return Shot(self.media[i], CAPTION, self.names[i])


class Prompts:
    """Queries with shots of the same task before them, drawn from a support set.

    `tokens`: room for a query and for each shot. Longer ones of the support set are not used.
    """

    def __init__(self, support: Pictures, tokenizer: TextTokenizer, count: int, tokens: Mapping[str, int], seed: int):
        pool: dict[str, list[Shot]] = {"caption": [support.caption(i) for i in range(len(support.media))]}
        for asked in support.ask(max(64, count), seed + 1):
            pool.setdefault(asked.task, []).append(support.shot(asked))
        self._pool = {
            task: [shot for shot in shots if length(shot.parts(), tokenizer) <= tokens["shot"]]
            for task, shots in pool.items()
        }
        self._tokens, self._seed = tokens, seed

    def __call__(self, queries: Sequence[Shot], tasks: Sequence[str], shots: int) -> list[Document]:
        """The same shots at every call. Without any, two that are text only tell what is asked for.

        Where a query has no image, its shots have none either.
        """
        documents = []
        for i, (query, task) in enumerate(zip(queries, tasks, strict=True)):
            pool = self._pool[task]
            rng = np.random.default_rng([self._seed, shots, i])
            before = [pool[j] for j in rng.permutation(len(pool))[: shots or 2]]
            if shots == 0 or query.media is None:
                before = [shot.without_media() for shot in before]
            documents.append(few_shot(before, query))
        return documents

    def shape(self, shots: int, image_size: int) -> Shape:
        """Room for so many shots and a query."""
        return Shape(shots + 1, 1, image_size, self._tokens["query"] + (shots or 2) * self._tokens["shot"])


@dataclass(frozen=True)
class _Run:
    """The three parts of an evaluation. Figures beside the numbers of shots are those of the most shots."""

    responder: Responder
    pictures: Pictures
    prompts: Prompts
    shots: tuple[int, ...]
    seed: int

    def say(self, queries: Sequence[Shot], tasks: Sequence[str], shots: int) -> list[str]:
        shape = self.prompts.shape(shots, self.responder.task.image_size)
        return self.responder.answers(self.prompts(queries, tasks, shots), shape)

    def answers(self, asked: Sequence[questions.Asked]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        queries, tasks = [self.pictures.shot(a) for a in asked], [a.task for a in asked]
        expected = [a.answer for a in asked]
        chance = questions.chance(asked)
        chance["all"] = float(np.mean([chance[task] for task in tasks]))
        examples = [
            {"record": self.pictures.records[a.record], "task": a.task, "question": a.question, "answer": a.answer}
            for a in asked
        ]
        by_shots: dict[str, Any] = {}
        for n in self.shots:
            right = {}
            for images in IMAGES:
                said = self.say(with_images(queries, images, self.seed), tasks, n)
                right[images] = exact_match(said, expected)
                if images == "true":
                    for example, text in zip(examples, said, strict=True):
                        example[f"shots_{n}"] = text

            def shares(among: np.ndarray, right: dict[str, np.ndarray] = right) -> dict[str, float]:
                return {f"{images}_images": float(scores[among].mean()) for images, scores in right.items()}

            by_shots[f"shots_{n}"] = {
                **shares(np.ones(len(asked), bool)),
                "interval": bootstrap_interval(right["true"], right["shuffled"], seed=self.seed),
                "interval_no_images": bootstrap_interval(right["true"], right["no"], seed=self.seed),
                "tasks": {task: shares(np.array(tasks) == task) for task in sorted(set(tasks))},
            }
        fewest, most = (by_shots[f"shots_{n}"] for n in (min(self.shots), max(self.shots)))
        return {
            "questions": len(asked),
            "chance": chance,
            "shots": max(self.shots),
            **most,
            "difference_of_shots": most["true_images"] - fewest["true_images"],
            **by_shots,
        }, examples

    def captions(self, captioned: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        queries, tasks = [self.pictures.caption(i) for i in captioned], ["caption"] * len(captioned)
        references = [self.pictures.references[i] for i in captioned]
        examples = [
            {"record": self.pictures.records[i], "task": "caption", "question": "", "answer": self.pictures.names[i]}
            for i in captioned
        ]
        by_shots: dict[str, Any] = {}
        for n in self.shots:
            said = self.say(queries, tasks, n)
            other = self.say(with_images(queries, "shuffled", self.seed), tasks, n)
            by_shots[f"shots_{n}"] = caption_scores(said, references) | {
                "shuffled_images": caption_scores(other, references)
            }
            for example, text in zip(examples, said, strict=True):
                example[f"shots_{n}"] = text
        fewest, most = (by_shots[f"shots_{n}"] for n in (min(self.shots), max(self.shots)))
        difference = {key: most[key] - fewest[key] for key in ("cider", "named")}
        return {"captions": len(captioned), "difference_of_shots": difference, **by_shots}, examples

    def losses(self, asked: Sequence[questions.Asked], captioned: np.ndarray) -> dict[str, Any]:
        """The loss on answers and captions: with the true images, with others', and with the gates closed."""
        queries = [*(self.pictures.shot(a) for a in asked), *(self.pictures.caption(i) for i in captioned)]
        shape = self.prompts.shape(0, self.responder.task.image_size)

        def losses(images: str, gates: bool = True) -> np.ndarray:
            documents = [Document(shot.parts()) for shot in with_images(queries, images, self.seed)]
            return self.responder.losses(documents, shape, gates=gates)

        true, shuffled, closed = losses("true"), losses("shuffled"), losses("true", gates=False)
        return {
            "documents": len(queries),
            "true": float(true.mean()),
            "shuffled": float(shuffled.mean()),
            "gates_off": float(closed.mean()),
            "interval_shuffled": bootstrap_interval(shuffled, true, seed=self.seed),
            "interval_gates_off": bootstrap_interval(closed, true, seed=self.seed),
        }


def with_images(queries: Sequence[Shot], images: str, seed: int) -> list[Shot]:
    """The queries with their own ("true") images, each with another's ("shuffled"), or with none ("no")."""
    if images == "no":
        return [query.without_media() for query in queries]
    if images == "true":
        return list(queries)
    order = np.random.default_rng(seed).permutation(len(queries))
    other = np.empty(len(queries), int)
    other[order] = np.roll(order, 1)  # around one circle: none keeps its own
    return [replace(query, media=queries[i].media) for query, i in zip(queries, other, strict=True)]


def caption_scores(said: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """CIDEr, and the share of captions that are one of their references."""
    mean, _ = cider(said, references)
    named = [text.lower() in {r.lower() for r in some} for text, some in zip(said, references, strict=True)]
    return {"cider": mean, "named": float(np.mean(named))}
