"""Metrics to a JSON-lines file and to TensorBoard, written by one process."""

import json
from collections.abc import Mapping
from pathlib import Path

from tensorboardX import SummaryWriter

from clip_jax.files import write_atomically


class MetricsWriter:
    """One line {"step": s, …} for each call in `metrics.jsonl`, the same as TensorBoard scalars.

    Opened at the step a run resumes from: later lines, which it will write again, are dropped.
    """

    def __init__(self, workdir: Path, step: int):
        self._path = workdir / "metrics.jsonl"
        if self._path.exists():
            kept = [row for row in read_metrics(workdir) if row["step"] <= step]
            write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = self._path.open("a", buffering=1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`; a last line cut off by a kill is left out."""
    rows = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
