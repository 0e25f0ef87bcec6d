"""Evaluates a trained run on held-out data: zero-shot classification and retrieval.

    python -m launch.evaluate --workdir runs/quickstart/clip

Prints a table; writes `evaluation.json` (every figure with its chance level) and `predictions.json` (what a
report shows) to the workdir. The config and the parameters are the newest checkpoint's.
"""

import json
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from tqdm import tqdm

from clip_jax import sharding
from clip_jax.data.sources import open_source
from clip_jax.errors import ConfigError
from clip_jax.evaluation.pairs import Evaluation, evaluate_source
from clip_jax.files import write_atomically
from clip_jax.training import checkpoint
from clip_jax.training.clip_task import ClipTask
from launch import command

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run to evaluate.")
SHOWN = 24  # examples of each source that predictions.json holds


def main() -> None:
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: name the directory of a run")
    workdir = Path(WORKDIR.value)
    path = checkpoint.latest(workdir)
    metadata = checkpoint.metadata(path)
    results_path = workdir / "evaluation.json"
    if results_path.exists() and json.loads(results_path.read_text())["checkpoint"] == path.name:
        print(f"{results_path}: already holds the evaluation of checkpoint {path.name}")
        print_table(json.loads(results_path.read_text())["sources"])
        return
    config = ml_collections.ConfigDict(metadata["config"])
    mesh = sharding.make_mesh(config.mesh.to_dict(), jax.devices())
    task = ClipTask(config, mesh)
    with sharding.use_mesh(mesh):
        abstract, state = task.abstract_variables()
        params = checkpoint.load(path, "params", shardings_of(abstract))
        model_state = checkpoint.load(path, "state", shardings_of(state)) if jax.tree.leaves(state) else {}
        encoder = task.encoder(params, model_state, mesh)
        found = {}
        for name, spec in tqdm(config.data.evaluate.items(), desc="evaluate", unit="source", dynamic_ncols=True):
            found[name] = evaluate_source(encoder, open_source(spec), config.data.templates)
    sources = {name: evaluation.figures for name, evaluation in found.items()}
    if jax.process_index() == 0:
        shown = {name: predictions(evaluation) for name, evaluation in found.items()}
        write_atomically(workdir / "predictions.json", json.dumps(shown, indent=1, ensure_ascii=False) + "\n")
        results = {"checkpoint": path.name, "sources": sources}
        write_atomically(results_path, json.dumps(results, indent=1) + "\n")
        print_table(sources)


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


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


def print_table(sources: dict[str, Any]) -> None:
    print(f"{'':34}{'images':>8}{'classes':>9}{'top-1':>8}{'chance':>8}{'top-5':>8}{'R@5':>8}{'chance':>8}")
    for name, f in sources.items():
        chance = f["chance"]
        print(
            f"{name:34}{f['images']:8}{f['classes']:9}{f['top1']:8.1%}{chance['top1']:8.2%}"
            f"{f['top5']:8.1%}{f['recall_at_5']:8.1%}{chance['recall_at_5']:8.2%}"
        )


if __name__ == "__main__":
    command.run(main)
