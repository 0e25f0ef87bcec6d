"""A Flamingo on benchmarks of each kind, from files to `results.json`; its outputs and figures by another way."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image
from sklearn.metrics import roc_auc_score

from clip_jax import sharding
from clip_jax.errors import ConfigError, DataError, UserError
from clip_jax.training import checkpoint
from clip_jax.training.loop import run_metadata
from configs.flamingo import quickstart
from flamingo_jax.evaluation.benchmarks import Benchmark, open_benchmark
from flamingo_jax.evaluation.captioning import bleu, cider, coco_words
from flamingo_jax.evaluation.harness import Evaluation, Example, Settings
from flamingo_jax.evaluation.model import FlamingoModel
from flamingo_jax.evaluation.results import evaluate_to
from flamingo_jax.evaluation.rices import check_pictures, embed_pictures
from flamingo_jax.evaluation.vqa import vqa_accuracy
from flamingo_jax.loading import Loaded, load
from flamingo_jax.models.language_model import DecoderSpec
from flamingo_jax.training.flamingo_task import FlamingoTask
from launch import evaluate

COLOURS = ("red", "lime", "blue", "white", "black", "yellow", "grey", "pink", "orange")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 pictures, asked about in each way, and the last 5 of them as a support set."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    rows: dict[str, list[dict[str, Any]]] = {"captions": [], "questions": [], "labels": []}
    for i, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (50, 40), colour)
        picture.paste(Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)), (9, 5))
        picture.save(root / f"{colour}.png")
        image = f"{colour}.png"
        rows["captions"].append({"image": image, "captions": [f"a {colour} thing.", f"it's {colour}"]})
        rows["questions"].append({"image": image, "question": "which colour?", "answers": [colour] * 2 + ["none"]})
        rows["labels"].append({"image": image, "label": ("dark", "bright")[i % 2], "question": "how is it?"})
    for kind, some in rows.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        (root / f"{kind}_support.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some[4:]))
    return root


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the quickstart's debug model, of random weights and open gates, so that images matter."""
    workdir, config = tmp_path_factory.mktemp("run"), quickstart.get_config("debug")
    task, rng = FlamingoTask(config, sharding.make_mesh()), np.random.default_rng(1)

    def value(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if any(key in path[-1].key for key in ("scale", "var", "gate")):
            return np.ones(leaf.shape, np.float32)
        weight = leaf.ndim > 1 and "norm" not in jax.tree_util.keystr(path)
        return rng.normal(0, 0.2 if weight else 0.0, leaf.shape).astype(np.float32)

    abstract = sharding.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    params, state = jax.tree_util.tree_map_with_path(value, abstract)
    items = {f"params.{name}": {name: tree} for name, tree in params.items()} | {"state": state}
    (workdir / "checkpoints").mkdir()
    checkpoint.write(workdir / "checkpoints" / "00000007", items, run_metadata(config, task) | {"step": 7})
    return workdir


@pytest.fixture(scope="module")
def loaded(workdir: Path) -> Loaded:
    return load(workdir)  # on one device


@pytest.fixture(scope="module")
def model(workdir: Path) -> FlamingoModel:
    """On 8 devices, 9 queries in batches of 8."""
    mesh = sharding.make_mesh()
    return FlamingoModel(load(workdir, mesh=mesh), mesh, "run", batch_size=8)


def opened(data: Path, kind: str) -> tuple[Benchmark, Benchmark]:
    return open_benchmark(f"json:{data}/{kind}.jsonl"), open_benchmark(f"json:{data}/{kind}_support.jsonl")


SETTINGS = Settings(shots=(2,), permutations=2, new_tokens=5)


def ids_of(loaded: Loaded, prompt: str) -> list[int]:
    """A prompt's text as ids, special tokens where it writes them."""
    ids = loaded.tokenizer.start_ids
    for i, chunk in enumerate(prompt.split("<EOC>")):
        ids = ids + ([loaded.convention.end_id] if i else [])
        for j, text in enumerate(chunk.split("<image>")):
            ids = ids + (list(loaded.convention.image) if j else [])
            ids = ids + (loaded.tokenizer.encode(text) if text else [])
    return ids


def pictures_of(data: Path, example: dict[str, Any], support: Benchmark) -> list[Path]:
    image = {record.key: record.image for record in support.records}
    return [*(image[key] for key in example["shots"]), Path(example["image"])]


@pytest.mark.parametrize("kind", ["captions", "questions"])
def test_outputs_are_the_models_and_figures_follow_from_them(
    kind: str, data: Path, model: FlamingoModel, loaded: Loaded, tmp_path: Path
) -> None:
    benchmark, support = opened(data, kind)
    evaluate_to(Evaluation(model, benchmark, support, SETTINGS), tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    (run,) = results["runs"]
    examples = run["examples"]
    assert run["seed"] == 0 and run["versions"]["jax"] == jax.__version__ and len(examples) == 9
    assert {"spec", "family", "tokenizer_sha256", "preprocess", "dtype"} <= results["plan"]["model"].keys()

    example = examples[3]
    asked = "Output:" if kind == "captions" else "Question: which colour? Answer:"
    assert example["prompt"].count("<EOC>") == 2 and example["prompt"].endswith(f"<EOC><image>{asked}")
    if kind == "questions":  # against decoding of that prompt alone, on one device
        ids, images = ids_of(loaded, example["prompt"]), pictures_of(data, example, support)
        batch = loaded.make_batch([images], [ids])
        tokens = np.asarray(loaded.generate(loaded.params, batch, max_new_tokens=5, num_beams=3))[0].tolist()
        end = loaded.convention.end_id
        assert example["output"] == loaded.tokenizer.decode(tokens[: [*tokens, end].index(end)])
        assert len({e["output"] for e in examples}) > 1  # it sees something

    said, targets = [e["answer"] for e in examples], [e["targets"] for e in examples]
    figures = run["figures"]
    if kind == "captions":
        words, references = [coco_words(s) for s in said], [[coco_words(t) for t in some] for some in targets]
        mean, each = cider(words, references)
        assert figures["cider"] == pytest.approx(mean)
        assert [figures[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu(words, references))
    else:
        each = vqa_accuracy(said, targets)
        assert figures["accuracy"] == pytest.approx(each.mean())
    assert [e["score"] for e in examples] == pytest.approx(each.tolist())


def test_likelihoods_are_those_of_the_logits_and_figures_follow_from_them(
    data: Path, model: FlamingoModel, loaded: Loaded, tmp_path: Path
) -> None:
    benchmark, support = opened(data, "labels")
    (run,) = evaluate_to(Evaluation(model, benchmark, support, SETTINGS), tmp_path)["runs"]
    examples, classes = run["examples"], benchmark.classes
    assert classes == ("bright", "dark") and all(e["orders"] == [[0, 1], [1, 0]] for e in examples)

    example = examples[5]
    prompt, answers = ids_of(loaded, example["prompts"][1]), []
    for name in classes:
        answers.append([*loaded.tokenizer.encode(f" {name}"), loaded.convention.end_id])
    first, second, query = pictures_of(data, example, support)

    def log_likelihood(images: list[Path], answer: list[int]) -> float:
        batch = loaded.make_batch([images], [prompt + answer])
        log_p = np.asarray(jax.nn.log_softmax(loaded.logits(loaded.params, batch)))[0]
        return sum(float(log_p[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))

    for c, answer in enumerate(answers):
        expected = log_likelihood([second, first, query], answer)
        assert example["log_likelihoods"][1][c] == pytest.approx(expected, abs=2e-5)
        for wrong in ([first, second, query], [second, first, first]):  # such a mistake would be seen
            assert abs(log_likelihood(wrong, answer) - expected) > 5e-4

    mean = np.array([e["log_likelihoods"] for e in examples]).mean(axis=1)
    labels = [classes.index(e["targets"][0]) for e in examples]
    assert run["figures"]["accuracy"] == np.mean(mean.argmax(axis=1) == labels)
    assert run["figures"]["roc_auc"] == pytest.approx(roc_auc_score(labels, mean[:, 1] - mean[:, 0]))
    assert [e["answer"] for e in examples] == [classes[i] for i in mean.argmax(axis=1)]


class StripedClip:
    """Stands for a CLIP's encoder."""

    def __init__(self, good: np.ndarray):
        self.good = good

    def images(self, source: Any) -> tuple[np.ndarray, np.ndarray]:
        return np.array([[3.0 * i, 4.0 * i] for i in range(1, len(source) + 1)]), self.good


def test_a_prompt_that_fits_is_not_rounded_up_beyond_the_models_positions() -> None:
    spec = DecoderSpec(
        vocab_size=9, width=8, layers=1, heads=1, kv_heads=1, mlp_width=8, positions="learned", max_positions=50
    )
    model = object.__new__(FlamingoModel)
    model._loaded = SimpleNamespace(
        model=SimpleNamespace(language_model=SimpleNamespace(spec=spec)), preprocess=SimpleNamespace(image_size=8)
    )  # type: ignore[assignment]
    model._ids = lambda prompt, answer=None: [0] * 40  # type: ignore[method-assign]
    prompt = [Example(None, None, "")]
    assert model._shape([prompt], 4).tokens == 46  # of 64
    model.check([prompt], 10)
    with pytest.raises(ConfigError, match="a prompt of 40 tokens, and 11 for the answer; the model has 50 positions"):
        model.check([prompt], 11)


def test_embeddings_are_of_unit_length_and_no_picture_is_left_out(
    data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = [data / f"{colour}.png" for colour in COLOURS[:3]]
    good = np.array([True, True, True])
    monkeypatch.setattr("flamingo_jax.evaluation.rices.embedding_encoder", lambda *_: StripedClip(good))
    found = embed_pictures(None, None, paths)  # type: ignore[arg-type]
    assert list(found) == paths and all(row.tolist() == [0.6, 0.8] for row in found.values())
    good[1] = False
    with pytest.raises(DataError, match=r"lime.png: the image does not decode"):
        embed_pictures(None, None, paths)  # type: ignore[arg-type]
    check_pictures(paths)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(UserError, match="broken.jpg: the image does not decode"):
        check_pictures([*paths, tmp_path / "broken.jpg"])


def test_the_command(data: Path, workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = {"workdir": str(workdir), "output": str(tmp_path / "out"), "shots": ["2"], "max_tokens": 5, "prompts": 8,
            "benchmark": f"json:{data}/questions.jsonl", "support": f"json:{data}/questions_support.jsonl"}  # fmt: skip

    def call(**changes: Any) -> None:
        with flagsaver.flagsaver(**{key.replace("max_", "max-"): value for key, value in (spec | changes).items()}):
            evaluate.main()

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["evaluate"])
    call(json=str(tmp_path / "figures.json"))
    table = capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text()) == json.loads(
        (tmp_path / "out" / "results.json").read_text()
    )
    assert table == (tmp_path / "out" / "results.md").read_text() and table.splitlines()[2].startswith("| 2 | true |")
    for changes, line in (
        ({"flamingo": "x"}, "give one of --flamingo and --workdir"),
        ({"output": None}, "--output is missing"),
        ({"shots": ["two"]}, "--shots two: whole numbers"),
        ({"support": None}, "has no split for shots; name another file"),
        ({"benchmark": f"json:{data}/labels.jsonl"}, "a support set of vqa; .* is classification"),
        ({"shots": ["4"]}, "was made with settings"),
    ):
        with pytest.raises(ConfigError, match=line):
            call(**changes)
