"""The few-shot harness: which shots, which images, which figures; with models that need no computation."""

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from clip_jax.errors import ConfigError, DataError
from flamingo_jax.evaluation.benchmarks import Benchmark, Record
from flamingo_jax.evaluation.classification import ensembled, log_odds, roc_auc
from flamingo_jax.evaluation.harness import (
    Condition,
    Evaluation,
    Example,
    Prompt,
    Settings,
    answer,
    draw,
    table,
    with_images,
)
from flamingo_jax.evaluation.results import evaluate_to
from flamingo_jax.evaluation.shots import Selector, most_similar, permutations


def images(count: int) -> list[Path]:
    return [Path(f"{i}.png") for i in range(count)]


def test_random_shots_are_drawn_anew_for_each_query_and_seed() -> None:
    select = Selector(images(30), seed=0)
    chosen = [select(query, Path(f"{query}.png"), 8) for query in range(30)]
    assert chosen == [Selector(images(30), seed=0)(query, Path(f"{query}.png"), 8) for query in range(30)]
    assert all(len(set(some)) == 8 and query not in some for query, some in enumerate(chosen))
    assert len({tuple(some) for some in chosen}) == 30
    assert chosen[0] != Selector(images(30), seed=1)(0, Path("0.png"), 8)
    assert len(select(0, Path("0.png"), 0)) == 2  # the text-only examples
    counts = np.bincount(np.concatenate([select(query, Path("x"), 8) for query in range(400)]), minlength=30)
    assert counts.min() > 60 and counts.max() < 160  # 107 expected of each


def test_a_query_never_meets_its_own_picture() -> None:
    same = [Path("a.png")] * 5 + [Path("b.png"), Path("c.png")]
    for embeddings in (None, {Path(f"{name}.png"): np.eye(3)[i] for i, name in enumerate("abc")}):
        select = Selector(same, 0, embeddings)
        assert sorted(select(0, Path("a.png"), 2)) == [5, 6]
        with pytest.raises(DataError, match="a.png: 3 shots; the support set has 2 examples with other images"):
            select(0, Path("a.png"), 3)


def test_similar_shots_end_with_the_most_similar() -> None:
    """Against all similarities, sorted."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 6))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    embeddings = dict(zip(images(40), rows, strict=True))
    select = Selector(images(40), 3, embeddings)
    for query in (0, 17):
        similarity = {i: float(rows[i] @ rows[query]) for i in range(40) if i != query}
        expected = sorted(similarity, key=lambda i: similarity[i])[-4:]
        assert select(query, Path(f"{query}.png"), 4) == expected
    assert select(0, Path("0.png"), 0) == Selector(images(40), 3)(0, Path("0.png"), 0)  # text examples are drawn
    assert most_similar(np.ones(1), np.array([[1.0], [2.0], [2.0]])).tolist() == [1, 2, 0]


def test_permutations_are_different_and_the_first_is_the_given_order() -> None:
    found = permutations(4, 6, (0, 1))
    assert found[0].tolist() == [0, 1, 2, 3] and len({tuple(order) for order in found}) == 6
    assert all(sorted(order) == [0, 1, 2, 3] for order in found)
    assert len(permutations(2, 6, (0,))) == 2 and len(permutations(1, 6, (0,))) == 1
    assert [o.tolist() for o in permutations(4, 6, (0, 1))] == [o.tolist() for o in found]


def test_roc_auc_is_the_rank_statistic() -> None:
    """Over all pairs of a positive and a negative, ties counting half."""
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 9, 60).astype(float), rng.random(60) < 0.4
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert roc_auc(scores, positive) == pytest.approx(np.mean(pairs), abs=1e-12)
    with pytest.raises(DataError, match="2 of 2 records are positive"):
        roc_auc([1.0, 2.0], [True, True])
    with pytest.raises(DataError, match="not finite"):
        roc_auc([np.nan, 2.0], [True, False])


def test_an_ensemble_averages_log_likelihoods() -> None:
    values = np.log([[[0.5, 0.25], [0.02, 0.08]]])  # the mean of probabilities would choose the first
    assert log_odds(ensembled(values)) == pytest.approx([0.5 * np.log(0.5 * 4)])


PROMPT = [Example(Path(f"{i}.png"), "q", f"a{i}") for i in range(9)]


@pytest.mark.parametrize("shots", [0, 1, 2])
def test_conditions_change_the_pictures_and_nothing_else(shots: int) -> None:
    queries, before = PROMPT[:3], [PROMPT[3 + 2 * i : 3 + 2 * i + (shots or 2)] for i in range(3)]

    def seen(condition: str) -> tuple[list[Path | None], list[list[Path | None]]]:
        changed, around = with_images(queries, before, Condition(shots, condition, 0))
        for old, new in ((queries, changed), *zip(before, around, strict=True)):
            assert [replace(e, image=None) for e in old] == [replace(e, image=None) for e in new]
        return [e.image for e in changed], [[e.image for e in some] for some in around]

    own = [e.image for e in queries]
    theirs = [[e.image if shots else None for e in some] for some in before]
    blank: list[list[Path | None]] = [[None] * len(some) for some in before]
    assert seen("true") == (own, theirs)
    assert seen("no") == ([None] * 3, blank)
    assert seen("no_shots") == (own, blank)
    changed, around = seen("shuffled")
    assert around == theirs and sorted(map(str, changed)) == sorted(map(str, own))
    assert all(a != b for a, b in zip(changed, own, strict=True))
    changed, around = seen("shuffled_shots")
    assert changed == own
    if shots:
        assert all(a != b for x, y in zip(around, theirs, strict=True) for a, b in zip(x, y, strict=True))
        if shots > 1:
            assert [sorted(map(str, x)) for x in around] == [sorted(map(str, x)) for x in theirs]


@pytest.mark.parametrize(
    ("kind", "output", "counts"),
    [
        ("captioning", " A cat, sleeping.\nOutput: a dog", "A cat, sleeping."),
        ("captioning", " a cat Output: a dog", "a cat"),
        ("captioning", "a cat<image>Output: a dog", "a cat"),
        ("vqa", " two, maybe three", "two"),
        ("vqa", "red Question: what?", "red"),
        ("vqa", "", ""),
    ],
)
def test_what_counts_of_an_output(kind: str, output: str, counts: str) -> None:
    assert answer(kind, output) == counts


class Parrot:
    """Says what is right of pictures it is shown, and otherwise what the last shot says."""

    def __init__(self, records: Sequence[Record]):
        self.right = {(record.image, record.question or None): record.targets[0] for record in records}
        self.asked: list[tuple[int, int]] = []
        self.room = 33  # examples in a prompt

    def describe(self) -> dict[str, Any]:
        return {"spec": "parrot"}

    def show(self, prompt: Prompt) -> str:
        return "".join(f"{'<image>' if e.image else ''}{e.question or ''}:{e.answer};" for e in prompt[:-1])

    def check(self, prompts: Sequence[Prompt], new_tokens: int, answers: Sequence[str] = ()) -> None:
        if max(map(len, prompts)) > self.room:
            raise ConfigError("too long")

    def say(self, prompts: Sequence[Prompt], *, new_tokens: int, beams: int) -> list[str]:
        self.asked.append((new_tokens, beams))
        return [f" {self._answer(prompt)}\nand more" for prompt in prompts]

    def log_likelihoods(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        return np.array([[0.0 if self._answer(prompt) == a else -1.0 - i for i, a in enumerate(answers)]
                         for prompt in prompts])  # fmt: skip

    def _answer(self, prompt: Prompt) -> str:
        query = prompt[-1]
        return prompt[-2].answer if query.image is None else self.right[query.image, query.question]


def benchmark(kind: str, name: str, count: int, first: int = 0) -> Benchmark:
    records = []
    for i in range(first, first + count):
        targets = {"captioning": (f"picture number {i}", f"number {i}"), "vqa": (f"n {i}",) * 6 + ("x",) * 4}
        records.append(
            Record(
                f"key {i}",
                Path(f"{i}.png"),
                targets.get(kind, (("no", "yes")[i % 2],)),
                "" if kind == "captioning" else f"question {i}",
                f"group {i % 2}" if kind == "vqa" else "",
            )
        )
    classes = ("no", "yes") if kind == "classification" else ()
    return Benchmark(name, kind, records, classes, 'says "{}", hateful?' if classes else "")


def evaluation(kind: str, **settings: Any) -> Evaluation:
    mine, theirs = benchmark(kind, "b", 12), benchmark(kind, "s", 40, first=100)
    return Evaluation(Parrot(mine.records), mine, theirs, Settings(**settings))


@pytest.mark.parametrize("kind", ["captioning", "vqa", "classification"])
def test_figures_of_a_model_that_sees(kind: str) -> None:
    found = evaluation(kind, shots=(0, 4), images=("true", "no"), support_count=20)
    runs = {condition.name(): found.run(condition) for condition in found.settings.conditions()}
    assert list(runs) == ["0_shots.true.seed_0", "0_shots.no.seed_0", "4_shots.true.seed_0", "4_shots.no.seed_0"]
    headline = "cider" if kind == "captioning" else "accuracy"
    seen, blind = runs["4_shots.true.seed_0"], runs["4_shots.no.seed_0"]
    assert seen["figures"]["records"] == 12 and seen["figures"][headline] > blind["figures"][headline]
    low, high = seen["figures"]["interval"]
    assert low <= seen["figures"][headline] + 1e-9 and high >= seen["figures"][headline] - 1e-9
    assert len({key for run in runs.values() for e in run["examples"] for key in e["shots"]}) <= 20
    for example in seen["examples"]:
        shown = example["prompts"] if kind == "classification" else [example["prompt"]]
        assert all(prompt.count("<image>") == 4 for prompt in shown)
        assert {"key", "image", "targets", "answer", "score"} <= example.keys() and len(example["shots"]) == 4
    if kind == "captioning":
        assert seen["figures"]["bleu_4"] == 0 and seen["figures"]["bleu_3"] == pytest.approx(1)
        assert seen["examples"][3]["output"] == " picture number 3\nand more"
    if kind == "vqa":
        # Right is what six of ten said: every one left out, at least five others did.
        assert seen["figures"]["accuracy"] == 1 and blind["figures"]["accuracy"] == 0
        assert seen["figures"]["groups"] == {"group 0": 1.0, "group 1": 1.0}
        assert seen["figures"]["rule"] == "official VQA accuracy"
    if kind == "classification":
        assert seen["figures"]["accuracy"] == seen["figures"]["roc_auc"] == 1
        assert [len(e["prompts"]) for e in seen["examples"]] == [6] * 12
        assert [len(e["prompts"]) for e in runs["0_shots.true.seed_0"]["examples"]] == [2] * 12
        assert len(set(seen["examples"][0]["prompts"])) == 6
    results = {"plan": found.plan(), "runs": list(runs.values())}
    json.dumps(results)
    lines = table(results).splitlines()
    assert len(lines) == 6 and lines[4].startswith(f"| 4 | true | {100 * seen['figures'][headline]:.1f} |")


def test_defaults_and_settings_reach_the_model() -> None:
    found = evaluation("vqa", shots=(1,), seeds=(0, 1), count=5)
    runs = [found.run(condition) for condition in found.settings.conditions()]
    assert isinstance(found.model, Parrot) and found.model.asked == [(10, 3)] * 2
    assert [e["key"] for e in runs[0]["examples"]] == [e["key"] for e in runs[1]["examples"]]
    assert runs[0]["examples"][0]["shots"] != runs[1]["examples"][0]["shots"]
    plan = found.plan()
    assert plan["settings"]["new_tokens"] == 10 and plan["selection"] == "random" and plan["records"] == 12
    assert "± " in table({"plan": plan, "runs": runs}).splitlines()[2]


def test_records_are_drawn_in_their_order() -> None:
    records = benchmark("vqa", "b", 50).records
    some = [int(record.key.split()[1]) for record in draw(records, 10, 0)]
    assert some == sorted(some) and len(set(some)) == 10 and some != list(range(10))
    assert draw(records, 0, 0) == draw(records, 50, 1) == list(records)


def test_single_answers_are_matched_exactly() -> None:
    mine = benchmark("vqa", "b", 4)
    records = [replace(record, targets=record.targets[:1]) for record in mine.records]
    some = Evaluation(Parrot(records), replace(mine, records=records), benchmark("vqa", "s", 9, 100), Settings((0,)))
    assert some.run(Condition(0, "true", 0))["figures"] | {"interval": 0, "groups": 0} == {
        "records": 4, "accuracy": 1.0, "rule": "exact match", "interval": 0, "groups": 0,
    }  # fmt: skip


def test_what_does_not_fit_is_refused() -> None:
    mine, other = benchmark("vqa", "b", 3), benchmark("captioning", "s", 3)
    with pytest.raises(ConfigError, match="s: a support set of captioning; b is vqa"):
        Evaluation(Parrot([]), mine, other, Settings())
    labels = benchmark("classification", "b", 3)
    with pytest.raises(ConfigError, match="class 'maybe' is none of those of b"):
        Evaluation(Parrot([]), labels, replace(labels, classes=("maybe", "no")), Settings())
    for settings, line in (({"images": ("none",)}, "images 'none'"), ({"shots": ()}, "at least one of each"),
                           ({"shots": (-1,)}, "none below 0"), ({"beams": 0}, "beams, permutations ≥ 1")):  # fmt: skip
        with pytest.raises(ConfigError, match=line):
            Settings(**settings)


def test_what_the_last_condition_lacks_is_said_before_the_first(tmp_path: Path) -> None:
    for shots, line in ((41, "41 shots; the support set has 40"), (34, "too long")):
        found = evaluation("vqa", shots=(0, shots))
        with pytest.raises((ConfigError, DataError), match=line):
            evaluate_to(found, tmp_path)
        assert not cast(Parrot, found.model).asked and not list(tmp_path.iterdir())


def test_a_stopped_evaluation_goes_on_and_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, again = (evaluation("vqa", shots=(0, 2), images=("true", "no_shots"), seeds=(0, 1)) for _ in range(2))
    whole = evaluate_to(found, tmp_path / "whole")
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == ["results.json", "results.md"]
    assert [(run["shots"], run["images"], run["seed"]) for run in whole["runs"]] == [
        (0, "true", 0), (0, "true", 1), (2, "true", 0), (2, "true", 1), (2, "no_shots", 0), (2, "no_shots", 1),
    ]  # fmt: skip
    assert all(run["versions"]["jax"] and run["examples"][0]["prompt"] for run in whole["runs"])
    assert whole["plan"]["model"] == {"spec": "parrot"} and whole["plan"]["settings"]["seeds"] == [0, 1]

    run, done = Evaluation.run, list[Condition]()

    def stopping(self: Evaluation, condition: Condition) -> dict[str, Any]:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(condition)
        return run(self, condition)

    monkeypatch.setattr(Evaluation, "run", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_to(again, tmp_path / "parts")
    assert not (tmp_path / "parts" / "results.json").exists()
    done.clear()
    with pytest.raises(ConfigError, match=r"results.json: was made with settings \{.*name another directory"):
        evaluate_to(evaluation("vqa", shots=(0, 4)), tmp_path / "parts")
    assert evaluate_to(again, tmp_path / "parts") == whole and len(done) == 3
    done.clear()
    assert evaluate_to(again, tmp_path / "parts") == whole and not done
    with pytest.raises(ConfigError, match="was made with settings"):
        evaluate_to(evaluation("vqa", shots=(0, 4)), tmp_path / "parts")


def test_where_the_first_process_may_not_begin_no_other_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, played by threads; the second one sees none of the first one's files."""
    index, given = threading.local(), [np.zeros(0), np.zeros(0)]
    together = threading.Barrier(2, timeout=20)

    def gather(mine: Any, tiled: bool = False) -> np.ndarray:
        given[index.value] = np.asarray(mine)
        together.wait()
        found = np.stack(given)
        together.wait()
        return found

    monkeypatch.setattr("jax.process_index", lambda: index.value)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", gather)
    (tmp_path / "0" / "results.json.parts").mkdir(parents=True)
    plan = tmp_path / "0" / "results.json.parts" / "plan.json"

    def process(i: int) -> str:
        index.value = i
        with pytest.raises(ConfigError) as error:
            evaluate_to(evaluation("vqa"), tmp_path / str(i))
        return str(error.value)

    for text, message in (('{"model": 1}', "was made with benchmark null, not "), ("{", "JSONDecodeError")):
        plan.write_text(text)
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(process, range(2))
        assert message in first and first == second
