"""Evaluates a trained run on held-out data: CLIP by classification and retrieval, Flamingo by what it says.

    python -m launch.evaluate --workdir runs/quickstart/clip

Prints a table; writes `evaluation.json` (every figure with its chance level) and `predictions.json` (what a
report shows) to the workdir. The config and the parameters are the newest checkpoint's.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from clip_jax import sharding
from clip_jax.data.sources import open_source
from clip_jax.errors import ConfigError
from clip_jax.evaluation.pairs import Evaluation
from clip_jax.files import write_atomically
from clip_jax.training import checkpoint
from flamingo_jax.evaluation import few_shot
from flamingo_jax.training.flamingo_task import FlamingoTask
from launch import command
from launch.tasks import build_task

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run to evaluate.")
SHOWN = 24  # examples of each source that predictions.json holds


def main() -> None:
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: name the directory of a run")
    workdir = Path(WORKDIR.value)
    path = checkpoint.latest(workdir)
    metadata = checkpoint.metadata(path)
    family = metadata["model"]["family"]
    if family not in EVALUATORS:
        raise ConfigError(f"{path}: a {family} checkpoint; expected one of {', '.join(EVALUATORS)}")
    evaluate, print_table = EVALUATORS[family]
    results_path = workdir / "evaluation.json"
    if results_path.exists() and json.loads(results_path.read_text())["checkpoint"] == path.name:
        print(f"{results_path}: already holds the evaluation of checkpoint {path.name}")
        print_table(json.loads(results_path.read_text()))
        return
    config = ml_collections.ConfigDict(metadata["config"])
    mesh = sharding.make_mesh(config.mesh.to_dict(), jax.devices())
    results, shown = evaluate(config, mesh, path)
    if jax.process_index() == 0:
        results = {"checkpoint": path.name, **results}
        write_atomically(workdir / "predictions.json", json.dumps(shown, indent=1, ensure_ascii=False) + "\n")
        write_atomically(results_path, json.dumps(results, indent=1) + "\n")
        print_table(results)


def load(task: Any, path: Path) -> tuple[Any, Any]:
    """(params, state) of a task's checkpoint, on its mesh."""
    abstract = jax.tree.map(lambda leaf: leaf.sharding, task.abstract_variables())
    params = checkpoint.load(path, "params", abstract[0])
    return params, checkpoint.load(path, "state", abstract[1]) if jax.tree.leaves(abstract[1]) else {}


def evaluate_pairs(config: ml_collections.ConfigDict, mesh: Mesh, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    task: Any = build_task(config, mesh)
    found = {}
    with sharding.use_mesh(mesh):
        evaluate_source = task.evaluator(*load(task, path), mesh)
        for name, spec in tqdm(config.data.evaluate.items(), desc="evaluate", unit="source", dynamic_ncols=True):
            found[name] = evaluate_source(open_source(spec))
    sources = {name: evaluation.figures for name, evaluation in found.items()}
    return {"sources": sources}, {name: predictions(evaluation) for name, evaluation in found.items()}


def evaluate_flamingo(
    config: ml_collections.ConfigDict, mesh: Mesh, path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    task = FlamingoTask(config, mesh)
    wanted = config.evaluation
    with sharding.use_mesh(mesh):
        params, state = load(task, path)
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


def print_pairs(results: dict[str, Any]) -> None:
    print(f"{'':34}{'images':>8}{'classes':>9}{'top-1':>8}{'chance':>8}{'top-5':>8}{'R@5':>8}{'chance':>8}")
    for name, f in results["sources"].items():
        chance = f["chance"]
        print(
            f"{name:34}{f['images']:8}{f['classes']:9}{f['top1']:8.1%}{chance['top1']:8.2%}"
            f"{f['top5']:8.1%}{f['recall_at_5']:8.1%}{chance['recall_at_5']:8.2%}"
        )


def print_flamingo(results: dict[str, Any]) -> None:
    answers, captions, loss = results["answers"], results["captions"], results["loss"]
    shots = [key for key in answers if key.startswith("shots_")]

    def row(name: str, f: dict[str, Any], chance: float, more: str = "") -> None:
        shares = (f["true_images"], f["shuffled_images"], f["no_images"], chance)
        print(f"{name:28}" + "".join(f"{share:10.1%}" for share in shares) + more)

    print(f"{'right answers':28}{'images':>10}{'shuffled':>10}{'none':>10}{'chance':>10}   images - shuffled, 95 %")
    for key in shots:
        low, high = (100 * x for x in answers[key]["interval"])
        row(f"{key[6:]} shots", answers[key], answers["chance"]["all"], f"   {low:+.1f} … {high:+.1f} points")
        for task, f in answers[key]["tasks"].items():
            row(f"    {task}", f, answers["chance"][task])
    print(f"of {answers['questions']} questions")

    print(f"{'captions':28}{'CIDEr':>10}{'shuffled':>10}{'named':>10}{'shuffled':>10}")
    for key in shots:
        f, other = captions[key], captions[key]["shuffled_images"]
        print(
            f"{key[6:] + ' shots':28}{f['cider']:10.3f}{other['cider']:10.3f}{f['named']:10.1%}{other['named']:10.1%}"
        )
    print(f"of {captions['captions']} captions")

    print(f"{'nats a token':28}{loss['true']:10.3f}{loss['shuffled']:10.3f}{loss['gates_off']:10.3f} with closed gates")
    for key in ("shuffled", "gates_off"):
        low, high = loss[f"interval_{key}"]
        print(f"    {key} - images: {low:+.3f} … {high:+.3f} (95 %)")
    print(f"in {loss['documents']} documents")


Evaluator = Callable[[ml_collections.ConfigDict, Mesh, Path], tuple[dict[str, Any], dict[str, Any]]]
EVALUATORS: dict[str, tuple[Evaluator, Callable[[dict[str, Any]], None]]] = {
    "clip": (evaluate_pairs, print_pairs),
    "bag_of_words": (evaluate_pairs, print_pairs),
    "captioning": (evaluate_pairs, print_pairs),
    "flamingo": (evaluate_flamingo, print_flamingo),
}

if __name__ == "__main__":
    command.run(main)
