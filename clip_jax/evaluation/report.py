"""The report of a run: a page that needs nothing beside it, and every number of it as JSON."""

import base64
import io
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from tqdm import tqdm

from clip_jax.data.sources import PairSource, open_source
from clip_jax.errors import DataError
from clip_jax.files import write_atomically
from clip_jax.training.metrics import read_metrics

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
    run = workdir / "clip"
    evaluation = read_json(run / "evaluation.json", f"python -m launch.evaluate --workdir {run}")
    shown = read_json(run / "predictions.json", f"python -m launch.evaluate --workdir {run}")
    config = read_json(run / "config.json", f"python -m launch.train --workdir {run}")
    seconds = json.loads((workdir / "seconds.json").read_text()) if (workdir / "seconds.json").exists() else {}
    rows = read_metrics(run)
    summary = {
        "clip": evaluation["sources"] | {"training": training_summary(rows, config)},
        "seconds": seconds | {"total": round(sum(seconds.values()), 1)},
    }
    galleries = []
    for name, spec in tqdm(config["data"]["evaluate"].items(), desc="report", unit="source", dynamic_ncols=True):
        galleries.append(gallery(name, open_source(spec), shown[name]))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        sources=evaluation["sources"],
        summary=summary,
        titles=TITLES,
        figures=FIGURES,
        galleries=galleries,
        curves=curves(rows, evaluation["sources"]),
        config=json.dumps(config, indent=1),
    )
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_atomically(workdir / "report.html", page)
    return workdir / "report.html"


def read_json(path: Path, command: str) -> Any:
    if not path.exists():
        raise DataError(f"{path}: not found; `{command}` writes it")
    return json.loads(path.read_text())


def training_summary(rows: list[dict[str, float]], config: Mapping[str, Any]) -> dict[str, float]:
    """Steps, last loss, and medians of speed and of the share of time spent waiting for data."""
    steps = [row for row in rows if "loss" in row]
    return {
        "steps": config["steps"],
        "batch_size": config["batch_size"],
        "final_loss": steps[-1]["loss"],
        "examples_per_second": round(statistics.median(row["examples_per_second"] for row in steps), 1),
        "data_wait_share": round(statistics.median(row["data_wait_share"] for row in steps), 4),
        "rejected_records": steps[-1]["rejected_records"],
    }


def gallery(name: str, source: PairSource, shown: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures of a source with their first labels, and names with the pictures that they find."""

    def picture(record: int) -> dict[str, str]:
        pair = source[record]
        return {"uri": data_uri(pair.image, "webp"), "text": pair.text, "style": pair.style}

    classification = [{**picture(row["record"]), "top": row["top"]} for row in shown["classification"]]
    retrieval = {
        style: [{"text": row["text"], "found": [picture(record) for record in row["records"]]} for row in rows[:8]]
        for style, rows in shown["retrieval"].items()
    }
    return {"name": name, "title": TITLES.get(name, name), "classification": classification, "retrieval": retrieval}


def data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def curves(rows: list[dict[str, float]], sources: Mapping[str, Any]) -> str:
    """Loss, held-out accuracy with its chance level, temperature and gradient, speed: one picture as a data URI."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.4), layout="constrained")
    steps = [row for row in rows if "loss" in row]

    def line(ax: Any, key: str, rows: list[dict[str, float]] = steps, scale: float = 1, **style: Any) -> None:
        ax.plot([row["step"] for row in rows], [scale * row[key] for row in rows], **style)

    line(axes[0, 0], "loss")
    axes[0, 0].set_title("training loss")
    for color, name in zip(("tab:blue", "tab:orange", "tab:green"), sources, strict=False):
        key = f"evaluation/{name}.top1"
        line(axes[0, 1], key, [r for r in rows if key in r], 100, marker="o", color=color, label=name.replace("_", " "))
        axes[0, 1].axhline(100 * sources[name]["chance"]["top1"], ls="--", lw=0.8, color=color)
    axes[0, 1].set_title("zero-shot top-1 in % (dashed: chance)")
    axes[0, 1].legend(frameon=False, fontsize=8)
    line(axes[1, 0], "logit_scale", label="logit scale")
    line(axes[1, 0], "gradient_norm", label="gradient norm")
    axes[1, 0].legend(frameon=False, fontsize=8)
    axes[1, 0].set_title("temperature and gradient")
    line(axes[1, 1], "examples_per_second")
    axes[1, 1].set_title("examples per second; grey: % of time waiting for data")
    line(axes[1, 1].twinx(), "data_wait_share", scale=100, color="0.7")
    for ax in axes.flat:
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return data_uri(buffer.getvalue(), "png")
