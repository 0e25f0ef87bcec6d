r"""Evaluates a trained run on its own held-out data, any CLIP on any data, or any Flamingo on published benchmarks;
on every host at once.

    python -m launch.evaluate --workdir runs/quickstart/clip

The run's own: CLIP by classification and retrieval, Flamingo by what it says. Prints a table; writes
`evaluation.json` (every figure with its chance level) and `predictions.json` (what a report shows) to the
workdir. The config and the parameters are the newest checkpoint's.

    python -m launch.evaluate --model openai:ViT-B-32.pt --data imagenet/val --classes imagenet --templates openai80 \
        --output runs/imagenet
    python -m launch.evaluate --model hf:DIRECTORY --data tfds:cifar10/test --tasks zero_shot,linear_probe \
        --train-data tfds:cifar10/train --data-dir tensorflow_datasets

Any other: zero-shot classification, retrieval and a linear probe (`clip_jax.evaluation.benchmark`). Prints a
table; writes it as `results.md`, and all figures as `results.json`, to the output directory.

    python -m launch.evaluate --flamingo open_flamingo:checkpoint.pt --language-model hf:DIRECTORY \
        --vision open_clip:FILE,CONFIG.json --benchmark coco:DIRECTORY --shots 0,4,8 --rices hf:CLIP --output runs/coco
    python -m launch.evaluate --workdir runs/quickstart/flamingo --benchmark json:questions.jsonl \
        --support json:examples.jsonl --shots 0,4 --images true,no_shots,shuffled --output runs/questions

A Flamingo with examples before each question (`flamingo_jax.evaluation.harness`). Benchmarks, in the files they are
published in: `flamingo_jax.evaluation.benchmarks`. Prints a table and writes it as `results.md`; `results.json` holds
also every prompt and raw output. Stopped and started again, it goes on.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from clip_jax import sharding
from clip_jax.data.sources import PairSource, open_source
from clip_jax.errors import ConfigError
from clip_jax.evaluation import benchmark, prompts
from clip_jax.evaluation.pairs import Evaluation
from clip_jax.files import is_folder, read_lines, write_atomically
from clip_jax.loading import load
from clip_jax.training import checkpoint
from flamingo_jax.evaluation import benchmarks, few_shot, harness
from flamingo_jax.evaluation.model import FlamingoModel
from flamingo_jax.evaluation.results import evaluate_to
from flamingo_jax.evaluation.rices import check_pictures, embed_pictures
from flamingo_jax.loading import load as load_flamingo
from flamingo_jax.training.flamingo_task import FlamingoTask
from launch import command
from launch.tasks import build_task

# Flags that other commands define alike are allowed to: where one process imports both, absl keeps the later.
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run to evaluate.", allow_override=True)
MODEL = flags.DEFINE_string("model", None, "With --data: a model as clip_jax.load names it, instead of --workdir.")
DATA = flags.DEFINE_string("data", None, "A folder of class folders, a folder of images with captions, or KIND:WHERE.")
TRAIN_DATA = flags.DEFINE_string("train-data", None, "What a linear probe is fitted to, named like --data.")
DATA_DIR = flags.DEFINE_string("data-dir", None, "Where TFDS keeps its data sets (for tfds:NAME/SPLIT).")
TASKS = flags.DEFINE_list("tasks", [], f"Of {', '.join(benchmark.TASKS)}; by default what the data allow.")
TEMPLATES = flags.DEFINE_string("templates", "a photo of a {}.", "openai80, openai7, a text with {} or a file of such.")
CLASSES = flags.DEFINE_string("classes", None, "Names for the classes: `imagenet`, or a file of one a line.")
OUTPUT = flags.DEFINE_string("output", None, "Directory for the results of --data.")
JSON = flags.DEFINE_string("json", None, "File to write the same figures to.", allow_override=True)
PREPROCESS = flags.DEFINE_enum("preprocess", None, ["clip", "siglip"], "Where no file beside the weights says it.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Where none is beside the weights and it is not OpenAI's.")
BATCH_SIZE = flags.DEFINE_integer("batch-size", 256, "Images embedded at once.", lower_bound=1)
THREADS = flags.DEFINE_integer("threads", 4, "That decode images, on each host.", lower_bound=1)
FLAMINGO = flags.DEFINE_string("flamingo", None, "With --benchmark: a model as flamingo_jax.load names it.")
LANGUAGE_MODEL = flags.DEFINE_string("language-model", None, "Of open_flamingo weights: hf:DIRECTORY.")
VISION = flags.DEFINE_string("vision", None, "Of open_flamingo weights: their tower, as clip_jax.load names it.")
BENCHMARK = flags.DEFINE_string("benchmark", None, f"KIND:WHERE[,SPLIT]; KIND: {', '.join(benchmarks.READERS)}.")
SUPPORT = flags.DEFINE_string("support", None, "Where shots come from, named alike; by default its training split.")
DEFAULTS = harness.Settings()
SHOTS = flags.DEFINE_list("shots", [str(n) for n in DEFAULTS.shots], "How many examples stand before a question.")
SEEDS = flags.DEFINE_list("seeds", [str(n) for n in DEFAULTS.seeds], "Each draws other examples.")
IMAGES = flags.DEFINE_list(
    "images", list(DEFAULTS.images), f"Which pictures a prompt has: {', '.join(harness.IMAGES)}."
)
RICES = flags.DEFINE_string("rices", None, "A CLIP as clip_jax.load names it: the shots are the most similar examples.")
COUNT = flags.DEFINE_integer("count", DEFAULTS.count, "Records of the benchmark, 0 for all.", lower_bound=0)
SUPPORT_COUNT = flags.DEFINE_integer(
    "support-count", DEFAULTS.support_count, "Examples drawn for each seed, 0 for all.", lower_bound=0
)
PERMUTATIONS = flags.DEFINE_integer("permutations", DEFAULTS.permutations, "Of the shots, for classes.", lower_bound=1)
BEAMS = flags.DEFINE_integer("beams", DEFAULTS.beams, "Of the search for answers and captions.", lower_bound=1)
MAX_TOKENS = flags.DEFINE_integer(
    "max-tokens", 0, f"Of an answer, 0 for what its kind has: {harness.NEW_TOKENS}.", lower_bound=0
)  # fmt: skip
PROMPTS = flags.DEFINE_integer("prompts", 8, "That are read at once.", lower_bound=1)
SHOWN = 24  # examples of each source that predictions.json holds


def main() -> None:
    if BENCHMARK.value:
        evaluate_benchmark()
    elif DATA.value:
        evaluate_data()
    elif WORKDIR.value and not MODEL.value:
        evaluate_run(Path(WORKDIR.value))
    else:
        raise ConfigError(
            "--workdir is missing: name the directory of a run, --model and --data, or --flamingo and --benchmark"
        )


def evaluate_benchmark() -> None:
    if bool(FLAMINGO.value) == bool(WORKDIR.value):
        raise ConfigError("--benchmark needs a model: give one of --flamingo and --workdir")
    if not OUTPUT.value:
        raise ConfigError("--output is missing: name a directory for the results")
    settings = harness.Settings(
        shots=numbers("shots", SHOTS.value), seeds=numbers("seeds", SEEDS.value), images=tuple(IMAGES.value),
        count=COUNT.value, support_count=SUPPORT_COUNT.value, permutations=PERMUTATIONS.value, beams=BEAMS.value,
        new_tokens=MAX_TOKENS.value,
    )  # fmt: skip
    names = class_names(CLASSES.value) if CLASSES.value else None
    benchmark = benchmarks.open_benchmark(BENCHMARK.value, classes=names)
    support = benchmarks.open_benchmark(SUPPORT.value or BENCHMARK.value, support=not SUPPORT.value, classes=names)
    pictures = harness.pictures(benchmark, support, settings)
    check_pictures(pictures, THREADS.value)
    mesh = sharding.make_mesh()
    spec = FLAMINGO.value or WORKDIR.value
    loaded = load_flamingo(
        spec, language_model=LANGUAGE_MODEL.value, vision=VISION.value, tokenizer=TOKENIZER.value,
        preprocess=PREPROCESS.value, mesh=mesh,
    )  # fmt: skip
    embeddings = None
    if RICES.value:
        with sharding.use_mesh(mesh):
            clip = load(RICES.value, mesh=mesh)
            embeddings = embed_pictures(clip, mesh, pictures, batch_size=BATCH_SIZE.value, threads=THREADS.value)
    model = FlamingoModel(loaded, mesh, spec, PROMPTS.value, THREADS.value)
    evaluation = harness.Evaluation(model, benchmark, support, settings, embeddings, RICES.value or "")
    results = evaluate_to(evaluation, Path(OUTPUT.value))
    if jax.process_index() == 0:
        show(results, harness.table)


def numbers(flag: str, values: Sequence[Any]) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in values)
    except ValueError:
        raise ConfigError(f"--{flag} {','.join(map(str, values))}: whole numbers between commas expected") from None


def evaluate_data() -> None:
    if bool(MODEL.value) == bool(WORKDIR.value):
        raise ConfigError("--data needs a model: give one of --model and --workdir")
    source = open_data(DATA.value)
    train = open_data(TRAIN_DATA.value) if TRAIN_DATA.value else None
    names = class_names(CLASSES.value) if CLASSES.value else None
    mesh = sharding.make_mesh()
    with sharding.use_mesh(mesh):
        loaded = load(MODEL.value or WORKDIR.value, preprocess=PREPROCESS.value, tokenizer=TOKENIZER.value, mesh=mesh)
        figures = benchmark.evaluate(
            loaded, mesh, source, TASKS.value, templates=TEMPLATES.value, class_names=names, train=train,
            batch_size=BATCH_SIZE.value, threads=THREADS.value,
        )  # fmt: skip
    results = {"model": MODEL.value or WORKDIR.value, "data": DATA.value, "train_data": TRAIN_DATA.value, **figures}
    if jax.process_index() == 0:
        show(results, benchmark.table)
        if OUTPUT.value:
            output = Path(OUTPUT.value)
            output.mkdir(parents=True, exist_ok=True)
            write_atomically(output / "results.md", benchmark.table(results) + "\n")
            write_atomically(output / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def open_data(spec: str) -> PairSource:
    return open_source(f"folder:{spec}" if is_folder(spec) else spec, DATA_DIR.value)


def class_names(where: str) -> list[str]:
    return prompts.imagenet_classes() if where == "imagenet" else read_lines(Path(where))


def evaluate_run(workdir: Path) -> None:
    path = checkpoint.latest(workdir)
    metadata = checkpoint.metadata(path)
    family = metadata["model"]["family"]
    if family not in EVALUATORS:
        raise ConfigError(f"{path}: a {family} checkpoint; expected one of {', '.join(EVALUATORS)}")
    evaluate, table = EVALUATORS[family]
    results_path = workdir / "evaluation.json"
    if results_path.exists() and json.loads(results_path.read_text())["checkpoint"] == path.name:
        logging.info("%s: already holds the evaluation of checkpoint %s", results_path, path.name)
        if jax.process_index() == 0:
            show(json.loads(results_path.read_text()), table)
        return
    config = ml_collections.ConfigDict(metadata["config"])
    mesh = sharding.make_mesh(config.mesh.to_dict(), jax.devices())
    results, shown = evaluate(config, mesh, path)
    if jax.process_index() == 0:
        results = {"checkpoint": path.name, **results}
        write_atomically(workdir / "predictions.json", json.dumps(shown, indent=1, ensure_ascii=False) + "\n")
        write_atomically(results_path, json.dumps(results, indent=1) + "\n")
        show(results, table)


def show(results: dict[str, Any], table: Callable[[dict[str, Any]], str]) -> None:
    print(table(results))
    if JSON.value:
        write_atomically(Path(JSON.value), json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def restore(task: Any, path: Path) -> tuple[Any, Any]:
    """(params, state) of a task's checkpoint, on its mesh."""
    abstract = jax.tree.map(lambda leaf: leaf.sharding, task.abstract_variables())
    params = checkpoint.load(path, "params", abstract[0])
    return params, checkpoint.load(path, "state", abstract[1]) if jax.tree.leaves(abstract[1]) else {}


def evaluate_pairs(config: ml_collections.ConfigDict, mesh: Mesh, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    task: Any = build_task(config, mesh)
    found = {}
    with sharding.use_mesh(mesh):
        evaluate_source = task.evaluator(*restore(task, path), mesh)
        for name, spec in tqdm(
            config.data.evaluate.items(), desc="evaluate", unit="source", dynamic_ncols=True,
            disable=jax.process_index() > 0 or None,
        ):  # fmt: skip
            found[name] = evaluate_source(open_source(spec))
    sources = {name: evaluation.figures for name, evaluation in found.items()}
    return {"sources": sources}, {name: predictions(evaluation) for name, evaluation in found.items()}


def evaluate_flamingo(
    config: ml_collections.ConfigDict, mesh: Mesh, path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    task = FlamingoTask(config, mesh)
    wanted = config.evaluation
    with sharding.use_mesh(mesh):
        params, state = restore(task, path)
        found = few_shot.evaluate(task, params, state, mesh, wanted.count, wanted.captions)
    results = {"answers": found.answers, "captions": found.captions, "loss": found.loss}
    return results, {"source": wanted.source, "examples": few_shot.spread(found.examples, SHOWN)}


def predictions(evaluation: Evaluation) -> dict[str, Any]:
    """Evenly chosen images with their first classes, and for each style a few names with what they find."""
    chosen = range(0, len(evaluation.records), max(1, len(evaluation.records) // SHOWN))
    classification = [
        {"record": int(evaluation.records[i]), "top": [evaluation.names[c] for c in evaluation.top[i]]} for i in chosen
    ]
    retrieval = {}
    for style, classes in evaluation.queries.items():
        rows = range(0, len(classes), max(1, len(classes) // SHOWN))
        retrieval[style] = [
            {"text": evaluation.names[classes[i]], "records": evaluation.retrieved[style][i].tolist()} for i in rows
        ]
    return {
        "classification": classification[:SHOWN],
        "retrieval": {k: v[:SHOWN] for k, v in retrieval.items()},
    }


def pairs_table(results: dict[str, Any]) -> str:
    lines = [f"{'':34}{'images':>8}{'classes':>9}{'top-1':>8}{'chance':>8}{'top-5':>8}{'R@5':>8}{'chance':>8}"]
    for name, f in results["sources"].items():
        chance = f["chance"]
        lines.append(
            f"{name:34}{f['images']:8}{f['classes']:9}{f['top1']:8.1%}{chance['top1']:8.2%}"
            f"{f['top5']:8.1%}{f['recall_at_5']:8.1%}{chance['recall_at_5']:8.2%}"
        )
    return "\n".join(lines)


def flamingo_table(results: dict[str, Any]) -> str:
    lines: list[str] = []
    answers, captions, loss = results["answers"], results["captions"], results["loss"]
    shots = [key for key in answers if key.startswith("shots_")]

    def row(name: str, f: dict[str, Any], chance: float, more: str = "") -> None:
        shares = (f["true_images"], f["shuffled_images"], f["no_images"], chance)
        lines.append(f"{name:28}" + "".join(f"{share:10.1%}" for share in shares) + more)

    lines.append(
        f"{'right answers':28}{'images':>10}{'shuffled':>10}{'none':>10}{'chance':>10}   images - shuffled, 95 %"
    )
    for key in shots:
        low, high = (100 * x for x in answers[key]["interval"])
        row(f"{key[6:]} shots", answers[key], answers["chance"]["all"], f"   {low:+.1f} … {high:+.1f} points")
        for task, f in answers[key]["tasks"].items():
            row(f"    {task}", f, answers["chance"][task])
    lines.append(f"of {answers['questions']} questions")

    lines.append(f"{'captions':28}{'CIDEr':>10}{'shuffled':>10}{'named':>10}{'shuffled':>10}")
    for key in shots:
        f, other = captions[key], captions[key]["shuffled_images"]
        lines.append(
            f"{key[6:] + ' shots':28}{f['cider']:10.3f}{other['cider']:10.3f}{f['named']:10.1%}{other['named']:10.1%}"
        )
    lines.append(f"of {captions['captions']} captions")

    lines.append(
        f"{'nats a token':28}{loss['true']:10.3f}{loss['shuffled']:10.3f}{loss['gates_off']:10.3f} with closed gates"
    )
    for key in ("shuffled", "gates_off"):
        low, high = loss[f"interval_{key}"]
        lines.append(f"    {key} - images: {low:+.3f} … {high:+.3f} (95 %)")
    lines.append(f"in {loss['documents']} documents")
    return "\n".join(lines)


Evaluator = Callable[[ml_collections.ConfigDict, Mesh, Path], tuple[dict[str, Any], dict[str, Any]]]
EVALUATORS: dict[str, tuple[Evaluator, Callable[[dict[str, Any]], str]]] = {
    "clip": (evaluate_pairs, pairs_table),
    "bag_of_words": (evaluate_pairs, pairs_table),
    "captioning": (evaluate_pairs, pairs_table),
    "flamingo": (evaluate_flamingo, flamingo_table),
}

if __name__ == "__main__":
    command.run(main)
