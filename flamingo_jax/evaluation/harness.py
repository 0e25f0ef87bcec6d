"""Few-shot evaluation of any Flamingo on any benchmark (arXiv 2204.14198 §4, appendix B.1.5).

For each number of shots, each of the `IMAGES` conditions and each seed: prompts, what the model makes of them, and
figures of that. What is kept of each record is enough to compute every figure again.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clip_jax.errors import ConfigError
from clip_jax.progress import brief
from flamingo_jax.data.prompts import CAPTION, before_tags
from flamingo_jax.evaluation.benchmarks import CAPTIONING, CLASSIFICATION, VQA, Benchmark, Record
from flamingo_jax.evaluation.captioning import bleu, cider, coco_words
from flamingo_jax.evaluation.classification import ensembled, log_odds, roc_auc
from flamingo_jax.evaluation.shots import PERMUTATIONS, Selector, permutations
from flamingo_jax.evaluation.statistics import bootstrap_interval
from flamingo_jax.evaluation.vqa import exact_match, first_answer, vqa_accuracy

IMAGES = ("true", "shuffled", "no", "shuffled_shots", "no_shots")
NEW_TOKENS = {CAPTIONING: 30, VQA: 10}
HEADLINE = {CAPTIONING: "cider", VQA: "accuracy", CLASSIFICATION: "accuracy"}


@dataclass(frozen=True)
class Example:
    """One of the pictures of a prompt, what is asked about it, and what is right.

    `question`: None where a caption is asked for. `template`: how the question is put, "{}" in it, where not in the
    model's own way.
    """

    image: Path | None
    question: str | None
    answer: str
    template: str = ""

    def without_image(self) -> "Example":
        return replace(self, image=None)


Prompt = Sequence[Example]  # the last one's answer is what the model is to give


class Model(Protocol):
    """What is evaluated. Every process calls it alike and gets everything."""

    def describe(self) -> Mapping[str, Any]:
        """What a result file says about it."""

    def show(self, prompt: Prompt) -> str:
        """A prompt as the text that the model reads."""

    def check(self, prompts: Sequence[Prompt], new_tokens: int, answers: Sequence[str] = ()) -> None:
        """Raises ConfigError where it has no room for them and so many tokens, or one of the answers."""

    def say(self, prompts: Sequence[Prompt], *, new_tokens: int, beams: int) -> list[str]:
        """What it goes on with after each prompt, up to the end of the chunk."""

    def log_likelihoods(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        """Of each answer, with the end of the chunk after it, to each prompt. [prompts, answers], in nats."""


@dataclass(frozen=True)
class Settings:
    """How a benchmark is put to a model.

    `images`, of IMAGES: each query with its own picture ("true"), with another query's ("shuffled"), or all without
    pictures ("no"); its own, but the shots with one another's ("shuffled_shots") or without any ("no_shots").
    `count` and `support_count`: of records drawn from the benchmark and its support set, 0 for all of them; the
    queries are the same for each seed. `new_tokens`: 0 for as many as the kind of benchmark has by default.
    """

    shots: tuple[int, ...] = (0, 4, 8, 16, 32)
    seeds: tuple[int, ...] = (0,)
    images: tuple[str, ...] = ("true",)
    count: int = 0
    support_count: int = 2048
    permutations: int = PERMUTATIONS
    beams: int = 3
    new_tokens: int = 0

    def __post_init__(self) -> None:
        if unknown := set(self.images) - set(IMAGES):
            raise ConfigError(f"images {sorted(unknown)[0]!r}: expected some of {', '.join(IMAGES)}")
        if not self.shots or not self.seeds or not self.images:
            raise ConfigError("shots, seeds and images: at least one of each expected")
        if min(self.shots) < 0 or min(self.seeds) < 0 or min(self.beams, self.permutations) < 1:
            raise ConfigError(f"shots {self.shots}, seeds {self.seeds}: none below 0 expected; beams, permutations ≥ 1")

    def conditions(self) -> list["Condition"]:
        """Without shots, what is done to their images makes no difference, and is left out."""
        return [
            Condition(shots, images, seed)
            for shots in self.shots
            for images in self.images
            for seed in self.seeds
            if shots or not images.endswith("_shots")
        ]


@dataclass(frozen=True)
class Condition:
    shots: int
    images: str
    seed: int

    def name(self) -> str:
        return f"{self.shots}_shots.{self.images}.seed_{self.seed}"


def draw(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """`count` of the records in their order, or all where it is 0 or there are no more."""
    if not count or count >= len(records):
        return list(records)
    return [records[i] for i in sorted(np.random.default_rng([seed, 5]).permutation(len(records))[:count])]


def pictures(benchmark: Benchmark, support: Benchmark, settings: Settings) -> list[Path]:
    """All that an evaluation looks at, each once."""
    records = draw(benchmark.records, settings.count, 0)
    for seed in settings.seeds:
        records += draw(support.records, settings.support_count, seed)
    return list(dict.fromkeys(record.image for record in records))


def example_of(record: Record, benchmark: Benchmark) -> Example:
    """A record as it stands in a prompt. Of several answers the one that most gave, of captions the first."""
    answer = max(record.targets, key=record.targets.count)
    if benchmark.kind == CAPTIONING:
        return Example(record.image, None, record.targets[0])
    asked = record.question if record.question or benchmark.prompt else None
    return Example(record.image, asked, answer, benchmark.prompt)


@dataclass(frozen=True)
class Evaluation:
    """A benchmark, the support set for it, and how the one is put to a model with examples of the other.

    `embeddings`: of all their pictures (see `pictures`), for RICES, by the model that result files call
    `embedded_by`; without, shots are drawn at random.

    Raises ConfigError where the two are of different kinds, or a support set has other classes.
    """

    model: Model
    benchmark: Benchmark
    support: Benchmark
    settings: Settings
    embeddings: Mapping[Path, np.ndarray] | None = None
    embedded_by: str = ""

    def __post_init__(self) -> None:
        mine, theirs = self.benchmark, self.support
        if theirs.kind != mine.kind:
            raise ConfigError(f"{theirs.name}: a support set of {theirs.kind}; {mine.name} is {mine.kind}")
        if unknown := sorted(set(theirs.classes) - set(mine.classes)):
            raise ConfigError(f"{theirs.name}: class {unknown[0]!r} is none of those of {mine.name}: name all of them")

    def plan(self) -> dict[str, Any]:
        """All that the results depend on, as JSON."""
        return {
            "benchmark": self.benchmark.name,
            "kind": self.benchmark.kind,
            "records": len(self.benchmark.records),
            "support": self.support.name,
            "support_records": len(self.support.records),
            "classes": list(self.benchmark.classes),
            "selection": "random" if self.embeddings is None else f"rices {self.embedded_by}".strip(),
            "model": dict(self.model.describe()),
            "settings": asdict(self.settings) | {"new_tokens": self._new_tokens()},
        }

    def queries(self) -> list[Record]:
        return draw(self.benchmark.records, self.settings.count, 0)

    def _new_tokens(self) -> int:
        return self.settings.new_tokens or NEW_TOKENS.get(self.benchmark.kind, 0)

    def check(self) -> None:
        """Raises, before anything is computed, what a condition would: too few examples for its shots (DataError), or
        prompts that the model has no room for (ConfigError).
        """
        answers = self.benchmark.classes if self.benchmark.kind == CLASSIFICATION else ()
        conditions = self.settings.conditions()
        for condition in brief(conditions, total=len(conditions), desc="prompts", unit="condition"):
            _, _, asked, shots = self._put(condition)
            prompts = [[*before, query] for before, query in zip(shots, asked, strict=True)]
            self.model.check(prompts, self._new_tokens(), answers)

    def _put(self, condition: Condition) -> tuple[list[Record], list[list[Record]], list[Example], list[Prompt]]:
        """(the queries, each one's shots), and both as they stand in the prompts."""
        queries = self.queries()
        support = draw(self.support.records, self.settings.support_count, condition.seed)
        select = Selector([record.image for record in support], condition.seed, self.embeddings)
        chosen = [[support[j] for j in select(i, q.image, condition.shots)] for i, q in enumerate(queries)]
        asked = [example_of(query, self.benchmark) for query in queries]
        shots: list[Prompt] = [[example_of(shot, self.support) for shot in some] for some in chosen]
        return queries, chosen, *with_images(asked, shots, condition)

    def run(self, condition: Condition) -> dict[str, Any]:
        """Figures, and of each record the shots, prompts and raw outputs."""
        benchmark = self.benchmark
        queries, chosen, asked, shots = self._put(condition)
        examples: list[dict[str, Any]] = [
            {
                "key": query.key,
                "image": str(query.image),
                "question": query.question,
                "targets": list(query.targets),
                "group": query.group,
                "shots": [shot.key for shot in some],
            }
            for query, some in zip(queries, chosen, strict=True)
        ]
        if benchmark.kind == CLASSIFICATION:
            self._classify(examples, asked, shots, condition.seed)
        else:
            self._generate(examples, asked, shots)
        return {**asdict(condition), "figures": figures(benchmark, examples), "examples": examples}

    def _generate(self, examples: list[dict[str, Any]], asked: Prompt, shots: Sequence[Prompt]) -> None:
        prompts = [[*before, query] for before, query in zip(shots, asked, strict=True)]
        said = self.model.say(prompts, new_tokens=self._new_tokens(), beams=self.settings.beams)
        for example, prompt, text in zip(examples, prompts, said, strict=True):
            example |= {"prompt": self.model.show(prompt), "output": text}

    def _classify(self, examples: list[dict[str, Any]], asked: Prompt, shots: Sequence[Prompt], seed: int) -> None:
        orders = [
            permutations(len(before), self.settings.permutations, (seed, len(before), i))
            for i, before in enumerate(shots)
        ]
        prompts = [
            [*(before[j] for j in order), query]
            for before, query, some in zip(shots, asked, orders, strict=True)
            for order in some
        ]
        found = self.model.log_likelihoods(prompts, self.benchmark.classes)
        found = found.reshape(len(asked), -1, len(self.benchmark.classes))
        shown = np.array([self.model.show(prompt) for prompt in prompts], object).reshape(len(asked), -1)
        for example, some, texts, values in zip(examples, orders, shown.tolist(), found.tolist(), strict=True):
            example["orders"] = [order.tolist() for order in some]  # of the shots, in each of the prompts
            example |= {"prompts": texts, "log_likelihoods": values}


def with_images(
    queries: Sequence[Example], shots: Sequence[Prompt], condition: Condition
) -> tuple[list[Example], list[Prompt]]:
    """The queries and each one's shots with the images of a condition; without shots, the text examples have none."""
    images = condition.images
    queries, shots = list(queries), list(shots)
    if images == "no":
        queries = [query.without_image() for query in queries]
    if images == "shuffled":
        order = np.random.default_rng(condition.seed).permutation(len(queries))
        other = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))  # around one circle
        queries = [replace(query, image=queries[other[i]].image) for i, query in enumerate(queries)]
    if condition.shots == 0 or images in ("no", "no_shots"):
        shots = [[shot.without_image() for shot in some] for some in shots]
    elif images == "shuffled_shots":
        pictures = [[shot.image for shot in some] for some in shots]
        # Each shot has its neighbour's; an only one that of the next query's.
        pictures = [some[1:] + some[:1] for some in pictures] if condition.shots > 1 else pictures[1:] + pictures[:1]
        shots = [
            [replace(shot, image=image) for shot, image in zip(some, others, strict=True)]
            for some, others in zip(shots, pictures, strict=True)
        ]
    return queries, shots


def answer(kind: str, output: str) -> str:
    """What counts of what a model said: the first line, and nothing of a shot that it goes on with by itself."""
    line = before_tags(output.strip().split("\n")[0])
    return (first_answer(line) if kind == VQA else line.split(CAPTION)[0]).strip()


def figures(benchmark: Benchmark, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of raw outputs; adds to each example the `answer` that counts and its `score`.

    Captioning: CIDEr-D and BLEU-1 to 4. VQA: the official accuracy, for records that have but one answer whether it
    is that one. Classification: accuracy, and of two classes the area under the ROC curve. `interval`: of the
    headline figure, 95 % by the bootstrap over records.
    """
    score: Callable[..., tuple[dict[str, Any], np.ndarray]]
    score = {CAPTIONING: _captions, VQA: _answers, CLASSIFICATION: _classes}[benchmark.kind]
    found, each = score(benchmark, examples)
    for example, value in zip(examples, each.tolist(), strict=True):
        example["score"] = value
    interval = bootstrap_interval(each, np.zeros(len(each)), seed=0)
    groups = {
        group: float(np.mean([value for e, value in zip(examples, each, strict=True) if e["group"] == group]))
        for group in sorted({example["group"] for example in examples} - {""})
    }
    return {"records": len(examples), **found, "interval": list(interval)} | ({"groups": groups} if groups else {})


def _captions(benchmark: Benchmark, examples: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], np.ndarray]:
    for example in examples:
        example["answer"] = answer(benchmark.kind, example["output"])
    said = [coco_words(example["answer"]) for example in examples]
    references = [[coco_words(text) for text in example["targets"]] for example in examples]
    mean, each = cider(said, references)
    return {"cider": mean} | {f"bleu_{n}": value for n, value in enumerate(bleu(said, references), 1)}, each


def _answers(benchmark: Benchmark, examples: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], np.ndarray]:
    for example in examples:
        example["answer"] = answer(benchmark.kind, example["output"])
    said, targets = [e["answer"] for e in examples], [e["targets"] for e in examples]
    several = min(map(len, targets)) > 1
    each = vqa_accuracy(said, targets) if several else exact_match(said, targets)
    return {"accuracy": float(each.mean()), "rule": "official VQA accuracy" if several else "exact match"}, each


def _classes(benchmark: Benchmark, examples: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], np.ndarray]:
    classes = benchmark.classes
    likelihoods_NxC = ensembled(np.array([example["log_likelihoods"] for example in examples]))
    for example, best in zip(examples, likelihoods_NxC.argmax(axis=1), strict=True):
        example["answer"] = classes[best]
    labels = np.array([classes.index(example["targets"][0]) for example in examples])
    each = (likelihoods_NxC.argmax(axis=1) == labels).astype(float)
    found = {"accuracy": float(each.mean()), "chance": 1 / len(classes)}
    if len(classes) == 2 and len(set(labels.tolist())) == 2:
        found["roc_auc"] = roc_auc(log_odds(likelihoods_NxC), labels == 1)
    return found, each


def table(results: Mapping[str, Any]) -> str:
    """The figures as a Markdown table, times 100; over several seeds the mean and the standard deviation."""
    runs = results["runs"]
    names = [name for name in ("cider", "bleu_4", "accuracy", "roc_auc") if name in runs[0]["figures"]]
    lines = [
        f"| shots | images | {' | '.join(names)} | 95 % of {HEADLINE[results['plan']['kind']]} | records |",
        "|---:|---|" + "---:|" * (len(names) + 2),
    ]
    for shots, images in dict.fromkeys((run["shots"], run["images"]) for run in runs):
        some = [run["figures"] for run in runs if (run["shots"], run["images"]) == (shots, images)]
        cells = []
        for name in names:
            values = 100 * np.array([f[name] for f in some if name in f])
            cells.append(f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""))
        low, high = 100 * np.mean([f["interval"] for f in some], axis=0)
        cells += [f"{low:.1f} … {high:.1f}", f"{some[0]['records']}"]
        lines.append(f"| {shots} | {images} | {' | '.join(cells)} |")
    return "\n".join(lines)
