"""What curation did: `report.json`, and a page with the same and its plots, of the files that the stages left."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np

from clip_jax.data.curation import files
from clip_jax.data.curation.queries import Query, read_queries
from clip_jax.data.curation.settings import Settings

matplotlib.use("Agg")
from matplotlib import pyplot

STEPS = ("read", "filtered", "unique", "kept")
TITLES = {
    "read": "read",
    "filtered": "accepted by the filters",
    "image": "with an image of their own",
    "text": "of texts not too often said",
    "near": "with an image not nearly another's",
    "matched": "that a query finds",
    "kept": "that stay",
}
SHOWN = 20


def summarize(settings: Settings, stages: dict[str, Any]) -> dict[str, Any]:
    """Every figure of the report, and the counts of each query for its plots (`counts`, step → [Q])."""
    queries = read_queries(settings.queries)
    counted = files.read_table(settings.file("counts", "queries"))
    counts = {name: counted[name].to_numpy() for name in STEPS[:-1]}
    counts["kept"] = files.read_table(settings.file("balance", "kept"))["pairs"].to_numpy()
    reasons = _items(settings.file("counts", "reasons"), "reason")
    left = _items(settings.file("unique", "left"), "step")
    steps = {"read": stages["scan"]["pairs"]}
    steps |= {name: left[name] for name in ("filtered", "image", "text", "near") if name in left}
    last = list(steps.values())[-1]
    no_query = reasons.pop("no_query", 0)
    steps |= {"matched": last - no_query, "kept": stages["shards"]["pairs"]}
    names = list(steps)
    dropped = reasons | {
        f"duplicate_{name}": steps[names[i - 1]] - steps[name]
        for i, name in enumerate(names)
        if name in ("image", "text", "near")
    }
    dropped |= {"no_query": no_query, "balance": steps["matched"] - steps["kept"]}
    head = counts["unique"] > settings.max_per_query
    matches = {
        name: {
            "head": int(counts[name][head].sum()),
            "tail": int(counts[name][~head].sum()),
            "queries": int((counts[name] > 0).sum()),
        }
        for name in STEPS
    }
    order = np.lexsort((np.arange(len(queries)), -counts["unique"]))
    found = order[: int((counts["unique"] > 0).sum())]
    tail = found[SHOWN:][:: max(1, len(found[SHOWN:]) // SHOWN)][:SHOWN]
    return {
        "input": settings.input,
        "steps": steps,
        "dropped": dropped,
        "queries": {
            "all": len(queries),
            "by_source": {s: sum(q.source == s for q in queries) for s in dict.fromkeys(q.source for q in queries)},
            "head": int(head.sum()),
        },
        "max_per_query": settings.max_per_query,
        "balance": settings.balance,
        "match": settings.match,
        "matches": matches,
        "head": _rows(found[:SHOWN], queries, counts),
        "tail": _rows(tail, queries, counts),
        "stages": {
            name: {**stage, "pairs_per_second": round(stage["pairs"] / max(stage["seconds"], 1e-9), 1)}
            for name, stage in stages.items()
        },
        "counts": counts,
    }


def write_report(settings: Settings, stages: dict[str, Any]) -> dict[str, Any]:
    """Writes `report.json` and `report.html`, which needs nothing beside it; returns the former."""
    summary = summarize(settings, stages)
    counts = summary.pop("counts")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.j2").render(
        summary=summary, titles=TITLES, step_names=STEPS, plots=_plots(summary, counts)
    )
    files.write_text(f"{settings.output}/report.json", json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    files.write_text(f"{settings.output}/report.html", page)
    return summary


def _items(path: str, name: str) -> dict[str, int]:
    table = files.read_table(path)
    return dict(zip(table[name].to_pylist(), table["pairs"].to_pylist(), strict=True))


def _rows(indices: np.ndarray, queries: list[Query], counts: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        {"query": queries[i].text, "source": queries[i].source} | {name: int(counts[name][i]) for name in STEPS}
        for i in indices.tolist()
    ]


def _plots(summary: dict[str, Any], counts: dict[str, np.ndarray]) -> str:
    """Pairs of each query, and what share of all matches the queries hold up to each, before and after."""
    figure, (each, share, steps) = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for name in ("read", "unique", "kept"):
        sorted_counts = np.sort(counts[name][counts[name] > 0])[::-1]
        each.plot(np.arange(1, len(sorted_counts) + 1), sorted_counts, label=TITLES.get(name, "without duplicates"))
        ascending = np.cumsum(sorted_counts[::-1])
        if len(ascending):
            share.plot(np.linspace(0, 100, len(ascending)), 100 * ascending / ascending[-1], label=name)
    each.axhline(summary["max_per_query"], ls="--", lw=0.8, color="0.5")
    each.set(xscale="log", yscale="log", title="pairs of each query", xlabel="queries, by their pairs")
    share.set(title="share of matches, from tail to head", xlabel="% of the queries", ylabel="%")
    each.legend(frameon=False, fontsize=8)
    share.legend(frameon=False, fontsize=8)
    names = list(summary["steps"])[::-1]
    steps.barh(names, [summary["steps"][name] for name in names])
    steps.set(title="pairs after each step")
    for ax in (each, share, steps):
        ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
