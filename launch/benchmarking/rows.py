"""What a row of the benchmark holds, and its table, JSON and plot."""

import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_jax.errors import UserError
from clip_jax.files import replacing, write_atomically
from launch.benchmarking.turns import Measured

LIBRARIES = ("jax", "jaxlib", "flax", "torch", "open_clip_torch", "transformers", "open_flamingo")
OURS = "clip-flamingo-jax"
MET, MISSED, NO_GOAL = "#3a9d6e", "#d2703c", "#9aa7b5"  # colours of the plot


@dataclass(frozen=True)
class Settings:
    rounds: int = 5
    quick: bool = False  # small batches and shapes: whether everything runs, not how fast


@dataclass(frozen=True)
class Row:
    """One measure of both sides, less being better; turn i of the one was taken beside turn i of the other.

    Raises UserError where the sides have not as many turns each.
    """

    name: str
    peer: str
    ours: Sequence[float]
    theirs: Sequence[float]
    goal: float | None  # of the ratio, theirs / ours, which is to be at least so much; or there is none
    unit: str = "s"
    limit: float | None = None  # what no program goes below on this machine
    limit_name: str = ""
    commit: str = ""  # that was measured

    def __post_init__(self) -> None:
        if not self.ours or len(self.ours) != len(self.theirs):
            raise UserError(f"{self.name}: {len(self.ours)} turns of ours, {len(self.theirs)} of {self.peer}'s")

    @property
    def ratios(self) -> list[float]:
        return [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def met(self) -> bool:
        return self.goal is None or self.ratio >= self.goal


@dataclass(frozen=True)
class Skipped:
    """A row that was not run, and why."""

    name: str
    why: str
    group: str = ""  # the name that it is asked for by


Result = Row | Skipped


def put(results: list[Result], row: Result) -> None:
    """In the place of the same row, or else as the last."""
    for i, old in enumerate(results):
        if old.name == row.name and getattr(old, "peer", None) == getattr(row, "peer", None):
            results[i] = row
            return
    results.append(row)


Rows = Callable[[Settings], Iterator[Result]]


def interleave(sides: Mapping[str, Callable[..., Any]], rounds: int, *call: Any) -> dict[str, list[Any]]:
    """What each side gives when called with `call`, in turns A B A B …: one that is not counted, and `rounds` more."""
    found: dict[str, list[Any]] = {side: [] for side in sides}
    for _ in tqdm(range(rounds + 1), unit="turn", leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty()):
        for side, run in sides.items():
            found[side].append(run(*call))
    return found


def seconds(runs: Sequence[Measured]) -> list[float]:
    """Of all turns but the first."""
    return [run.result.seconds for run in runs[1:]]


def figure(value: float, unit: str) -> str:
    if unit == "s" and value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def to_markdown(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    """The table, of medians; a ratio above 1 says that ours is faster or smaller."""
    lines = [
        "| row | peer | ours | peer's | ratio (least to most) | limit | goal | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        if isinstance(row, Row):
            ours, theirs = (figure(statistics.median(side), row.unit) for side in (row.ours, row.theirs))
            spread = f"{row.ratio:.2f}× ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
            limit = "" if row.limit is None else f"{figure(row.limit, row.unit)}: {row.limit_name}"
            goal = ["", ""] if row.goal is None else [f"≥ {row.goal:.2g}×", "met" if row.met else "missed"]
            cells = [row.name, row.peer, ours, theirs, spread, limit, *goal]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    lines += [f"- {row.name}: not run: {row.why}" for row in results if isinstance(row, Skipped)]
    others: dict[str, list[str]] = {}
    for row in results:
        if isinstance(row, Row) and row.commit not in ("", about["commit"]):
            others.setdefault(row.commit, []).append(f"{row.name} ({row.peer})")
    lines += [f"- by commit {commit}: {'; '.join(names)}" for commit, names in others.items()]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [f"\n{about['machine']}; Python {about['python']}, {versions}; commit {about['commit']};", ""]
    lines += [f"    {about['command']}", ""]
    return "\n".join(lines)


def read_json(path: Path) -> list[Result]:
    """The rows that `to_json` wrote. Raises UserError where the file is missing or another."""
    try:
        rows = json.loads(path.read_text())["rows"]
        return [
            Skipped(**row) if "why" in row else Row(**{k: v for k, v in row.items() if k not in ("ratios", "met")})
            for row in rows
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: not what --json wrote ({error})") from None


def to_json(results: Sequence[Result], about: Mapping[str, Any]) -> str:
    rows: list[dict[str, Any]] = []
    for row in results:
        fields = dataclasses.asdict(row)
        rows.append(fields | ({"ratios": row.ratios, "met": row.met} if isinstance(row, Row) else {}))
    return json.dumps({**about, "rows": rows}, indent=1) + "\n"


def plot(results: Sequence[Result], about: Mapping[str, Any], path: Path) -> None:
    """Each row's ratio, on a logarithmic scale from 1×, with its spread and its goal. Raises UserError where matplotlib
    is absent.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    rows = [row for row in results if isinstance(row, Row)][::-1]
    figure_, axes = pyplot.subplots(figsize=(11, 1.6 + 0.42 * len(rows)), layout="constrained")
    ends = [1.0]
    for y, row in enumerate(rows):
        low, high = min(row.ratios), max(row.ratios)
        colour = MET if row.met else MISSED
        axes.barh(y, row.ratio - 1, left=1, height=0.6, color=NO_GOAL if row.goal is None else colour)
        axes.errorbar(row.ratio, y, xerr=[[row.ratio - low], [high - row.ratio]], color="0.2", capsize=3, linewidth=1)
        if row.goal is not None:
            axes.plot([row.goal] * 2, [y - 0.42, y + 0.42], color="black", linewidth=2.5)
        most = max(high, row.goal or 0.0, 1.0)
        axes.annotate(f"{row.ratio:.2f}×", (most, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
        ends += [low, most, row.goal or 1.0]
    axes.axvline(1, color="0.2", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(ends) / 1.15, max(ends) * max(1.3, (max(ends) / min(ends)) ** 0.12))  # room for the last figure
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(rows)), [f"{row.name}\nbeside {row.peer}" for row in rows], fontsize=8)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel(f"the other's time or memory, divided by {OURS}'s: median, least and most of the turns")
    commits = dict.fromkeys(row.commit or about["commit"] for row in reversed(rows))
    axes.set_title(f"{about['machine']}; measured at {', '.join(commits)}", fontsize=9, loc="left")
    marks = [
        Patch(color=MET, label="goal met"),
        Patch(color=MISSED, label="missed"),
        Patch(color=NO_GOAL, label="no goal"),
    ]
    marks.append(Patch(color="black", label="goal"))
    figure_.legend(handles=marks, loc="outside upper right", ncols=len(marks), frameon=False, fontsize=9)
    with replacing(path) as temporary:
        figure_.savefig(temporary, dpi=150, format=path.suffix.removeprefix(".") or "png")
    pyplot.close(figure_)


def write(
    results: Sequence[Result], about: Mapping[str, Any], json_path: str | None, plot_path: str | None, table: str | None
) -> None:
    """Those of the files that are named. Raises UserError where one cannot be written."""
    path = None
    try:
        if path := json_path:
            write_atomically(Path(path), to_json(results, about))
        if path := table:
            write_atomically(Path(path), to_markdown(results, about))
        if path := plot_path:
            plot(results, about, Path(path))
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror}") from None


def check_writable(json_path: str | None, plot_path: str | None, table: str | None) -> None:
    """Raises UserError where one of the files cannot be written. What stands there stays."""
    if plot_path and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install matplotlib")
    for path in filter(None, (json_path, plot_path, table)):
        try:
            with Path(path).open("a"):
                pass
        except OSError as error:
            raise UserError(f"{path}: not written: {error.strerror}") from None


def about_this_run(arguments: Sequence[str]) -> dict[str, Any]:
    """Machine, versions, commit and command, as text."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
        "command": " ".join(["python -m launch.benchmark", *arguments]),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")
