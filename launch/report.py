"""Writes a quickstart's report: a page that needs nothing beside it, and every number of it as summary.json.

python -m launch.report --workdir runs/quickstart
"""

import base64
import io
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from absl import flags
from tqdm import tqdm

from clip_jax.data.sources import PairSource, open_source
from clip_jax.errors import ConfigError, DataError
from clip_jax.files import write_atomically
from clip_jax.training.metrics import read_metrics
from launch import command

matplotlib.use("Agg")
from matplotlib import pyplot

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory of the quickstart, with a run in clip/, language_model/, flamingo/.",
    allow_override=True,
)

TITLES = {
    "held_out_style": "Held-out style: Fluent, never seen in training",
    "unseen_concepts": "Unseen concepts, in seen styles",
    "unseen_concepts_held_out_style": "Unseen concepts in the held-out style",
}
FIGURES = {
    "top1": "zero-shot top-1",
    "top5": "zero-shot top-5",
    "recall_at_1": "text → image R@1",
    "recall_at_5": "text → image R@5",
    "recall_at_10": "text → image R@10",
    "image_to_text_recall_at_1": "image → text R@1",
    "image_to_text_recall_at_5": "image → text R@5",
    "image_to_text_recall_at_10": "image → text R@10",
}


def write_report(workdir: Path) -> Path:
    """Writes `summary.json` and `report.html` from what the stages left in `workdir`; returns the page's path.

    Raises DataError naming the file that is missing and the command that makes it.
    """
    clip, flamingo, lm = (workdir / name for name in ("clip", "flamingo", "language_model"))
    evaluation, shown, config = (read_stage(clip, name) for name in ("evaluation", "predictions", "config"))
    said, said_shown, flamingo_config = (read_stage(flamingo, name) for name in ("evaluation", "predictions", "config"))
    lm_config = read_stage(lm, "config")
    seconds = json.loads((workdir / "seconds.json").read_text()) if (workdir / "seconds.json").exists() else {}
    rows, lm_rows, flamingo_rows = (read_metrics(run) for run in (clip, lm, flamingo))
    summary = {
        "clip": evaluation["sources"] | {"training": training_summary(rows, config, config["batch_size"])},
        "language_model": {
            "held_out": {key: lm_rows[-1][f"evaluation/held_out.{key}"] for key in ("loss", "perplexity")}
            | {"chance": {"loss": lm_rows[-1]["evaluation/held_out.chance.loss"]}},
            "training": training_summary(lm_rows, lm_config, lm_config["batch_size"]),
        },
        "flamingo": {key: said[key] for key in ("answers", "captions", "loss")}
        | {
            "training": training_summary(
                flamingo_rows,
                flamingo_config,
                sum(part["batch_size"] for part in flamingo_config["data"]["mixture"].values()),
            )
        },
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
    }
    galleries = []
    sources = config["data"]["evaluate"].items()
    for name, spec in tqdm(sources, desc="report", unit="source", dynamic_ncols=True, disable=None):
        galleries.append(gallery(name, open_source(spec), shown[name]))
    asked = open_source(said_shown["source"])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        sources=evaluation["sources"],
        summary=summary,
        titles=TITLES,
        figures=FIGURES,
        galleries=galleries,
        said=[{**row, **picture(asked, row["record"])} for row in said_shown["examples"]],
        shots=[key for key in said["answers"] if key.startswith("shots_")],
        curves=clip_curves(rows, evaluation["sources"]),
        flamingo_curves=flamingo_curves(lm_rows, flamingo_rows),
        configs={
            name: json.dumps(c, indent=1)
            for name, c in (("clip", config), ("language model", lm_config), ("flamingo", flamingo_config))
        },
    )
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(workdir / "report.html", page)
    return workdir / "report.html"


def read_stage(run: Path, name: str) -> Any:
    """A JSON file that a stage leaves in its run."""
    path, stage = run / f"{name}.json", "train" if name == "config" else "evaluate"
    if not path.exists():
        raise DataError(f"{path}: not found; `python -m launch.{stage} --workdir {run}` writes it")
    return json.loads(path.read_text())


def training_summary(rows: list[dict[str, float]], config: Mapping[str, Any], batch_size: int) -> dict[str, float]:
    """Steps, last loss, and medians of speed and of the share of time spent waiting for data."""
    steps = [row for row in rows if "loss" in row]
    return {
        "steps": config["steps"],
        "batch_size": batch_size,
        "final_loss": steps[-1]["loss"],
        "examples_per_second": round(statistics.median(row["examples_per_second"] for row in steps), 1),
        "data_wait_share": round(statistics.median(row["data_wait_share"] for row in steps), 4),
        "rejected_records": steps[-1]["rejected_records"],
    }


def picture(source: PairSource, record: int) -> dict[str, str]:
    pair = source[record]
    return {"uri": data_uri(pair.image, "webp"), "text": pair.text, "style": pair.style}


def gallery(name: str, source: PairSource, shown: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures of a source with their first labels, and names with the pictures that they find."""
    classification = [{**picture(source, row["record"]), "top": row["top"]} for row in shown["classification"]]
    retrieval = {
        style: [
            {"text": row["text"], "found": [picture(source, record) for record in row["records"]]} for row in rows[:8]
        ]
        for style, rows in shown["retrieval"].items()
    }
    return {"name": name, "title": TITLES.get(name, name), "classification": classification, "retrieval": retrieval}


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def line(ax: Any, rows: list[dict[str, float]], key: str, scale: float = 1, **style: Any) -> None:
    rows = [row for row in rows if key in row]
    ax.plot([row["step"] for row in rows], [scale * row[key] for row in rows], **style)


def drawn(figure: Any, titles: Mapping[Any, str]) -> str:
    """A finished figure as a data URI."""
    for ax, title in titles.items():
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return data_uri(buffer.getvalue(), "png")


def clip_curves(rows: list[dict[str, float]], sources: Mapping[str, Any]) -> str:
    """Loss, held-out accuracy with its chance level, temperature and gradient, speed."""
    figure, ((loss, accuracy), (scale, speed)) = pyplot.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
    line(loss, rows, "loss")
    for color, name in zip(("tab:blue", "tab:orange", "tab:green"), sources, strict=False):
        line(accuracy, rows, f"evaluation/{name}.top1", 100, marker="o", color=color, label=name.replace("_", " "))
        accuracy.axhline(100 * sources[name]["chance"]["top1"], ls="--", lw=0.8, color=color)
    accuracy.legend(frameon=False, fontsize=8)
    for key in ("logit_scale", "gradient_norm"):
        line(scale, rows, key, label=key.replace("_", " "))
    scale.legend(frameon=False, fontsize=8)
    line(speed, rows, "examples_per_second")
    line(speed.twinx(), rows, "data_wait_share", 100, color="0.7")
    return drawn(figure, {
        loss: "training loss",
        accuracy: "zero-shot top-1 in % (dashed: chance)",
        scale: "temperature and gradient",
        speed: "examples per second; grey: % of time waiting for data",
    })  # fmt: skip


def flamingo_curves(lm_rows: list[dict[str, float]], rows: list[dict[str, float]]) -> str:
    """The language model's loss; Flamingo's of each part of its mixture; its gates."""
    figure, (lm, loss, gate) = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    line(lm, lm_rows, "loss")
    for key in sorted({key for row in rows for key in row if key.endswith("/loss")}):
        line(loss, rows, key, label=key.removesuffix("/loss"))
    loss.legend(frameon=False, fontsize=8)
    line(gate, rows, next(key for row in rows for key in row if key.endswith("gate")))
    return drawn(figure, {
        lm: "language model: nats a token",
        loss: "Flamingo: nats a token, images given",
        gate: "mean |tanh(gate)|",
    })  # fmt: skip


def main() -> None:
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: name the directory of a quickstart")
    path = write_report(Path(WORKDIR.value))
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB) and {path.with_name('summary.json')}")


if __name__ == "__main__":
    command.run(main)
