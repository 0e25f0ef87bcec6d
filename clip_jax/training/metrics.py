"""Metrics to a JSON-lines file, to TensorBoard and, where asked for, to Weights & Biases; written by one process.

None of them stops a run: what a full disk refuses is said, and the lines are written when there is room again.
"""

import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from clip_jax.errors import ConfigError
from clip_jax.files import write_atomically

SAID_IF_ANY = ("skipped_updates", "rejected_records", "failed_saves", "restarts")


class MetricsWriter:
    """One line {"step": s, …} for each call in `metrics.jsonl`, the same as TensorBoard scalars.

    Opened at the step a run resumes from: later lines, which it will write again, are dropped. Values that are no
    finite numbers, which JSON does not have, are left out.

    Args:
      wandb_project: of Weights & Biases; "" is none. The run there has the workdir's name, and is gone on with.
      config: of the run, for Weights & Biases.

    Raises ConfigError where a project is named and the package is missing.
    """

    def __init__(self, workdir: Path, step: int, wandb_project: str = "", config: Mapping[str, Any] | None = None):
        self._path = workdir / "metrics.jsonl"
        rows = read_metrics(workdir) if self._path.exists() else []
        kept = [row for row in rows if row["step"] <= step]
        if self._path.exists():
            write_atomically(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        self.evaluated = {int(row["step"]) for row in kept if any(key.startswith("evaluation/") for key in row)}
        self._unwritten = b""
        self._board = _Board(workdir / "tensorboard", step)
        self._wandb = _wandb_run(wandb_project, workdir, config or {}) if wandb_project else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        self._unwritten += (json.dumps({"step": step, **values}) + "\n").encode()
        self._flush()
        self._board.write(step, values)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def _flush(self) -> None:
        """Appends all lines not yet written, whole or not at all."""
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as file:
                file.write(self._unwritten)
        except OSError as error:
            if self._path.exists():
                os.truncate(self._path, size)
            lines = self._unwritten.count(b"\n")
            logging.error("%s can't be written: %s; %d lines kept until it can", self._path, error, lines)
        else:
            self._unwritten = b""

    def close(self) -> None:
        if self._unwritten:
            self._flush()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


class _Board:
    """TensorBoard's event files. After a failure a new one is begun: the old one ends in half an event."""

    def __init__(self, directory: Path, step: int):
        self._directory, self._step = directory, step
        self._events: EventsWriter | None = None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        try:
            if self._events is None:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._events = EventsWriter(str(self._directory / "events"), f".{time.time_ns()}")
                # TensorBoard forgets the steps from here on, which earlier files may hold.
                start = SessionLog(status=SessionLog.START)
                self._events.write_event(Event(wall_time=time.time(), step=self._step + 1, session_log=start))
            for name, value in values.items():
                scalar = summary.scalar(name, value)
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=scalar))
            self._events.flush()
        except OSError as error:
            logging.error("%s can't be written: %s; the run goes on", self._directory, error)
            self._events = None
        self._step = step

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


class Log:
    """What a run says of itself: a bar and a line for each row on the terminal, and the rows of its writer.

    All of it by process 0, which has the writer; the other processes call it alike, and say nothing.

    Args:
      predicted: figure → what a plan says it would be, at best; stands beside the measured one.
    """

    def __init__(self, writer: MetricsWriter | None, steps: int, start: int, predicted: Mapping[str, float]):
        self._writer, self._predicted = writer, predicted
        self._bar = tqdm(total=steps, initial=start, desc="train", unit="step", dynamic_ncols=True,
                         disable=None if writer else True, file=_Patient(sys.stderr))  # fmt: skip

    def evaluated(self, step: int) -> bool:
        """Whether a row of an evaluation at this step stands already; every process must ask."""
        known = self._writer is not None and step in self._writer.evaluated
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(known))) if jax.process_count() > 1 else known

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        predicted = {name: value for name, value in self._predicted.items() if name in values}
        self._writer.write(step, {**values, **{f"plan/{name}": value for name, value in predicted.items()}})
        shown = [
            f"{name.removeprefix('evaluation/')} {value:.4g}"
            + (f" (plan {predicted[name]:.4g})" if name in predicted else "")
            for name, value in values.items()
            if value or name not in SAID_IF_ANY
        ]
        tqdm.write(f"step {step:>6}  {'  '.join(shown)}", file=_Patient(sys.stdout))

    def show_loss(self, loss: float) -> None:
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def progress(self) -> None:
        self._bar.update(1)

    def close(self) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()


class _Patient:
    """A stream that a full disk, to which it may lead, doesn't make raise."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _wandb_run(project: str, workdir: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise ConfigError(f"wandb.project {project!r}: the package is missing: pip install '.[wandb]'") from None
    kept = workdir / "wandb_id"  # a run that is started again goes on with its curves
    if not kept.is_file():
        write_atomically(kept, secrets.token_hex(8))
    name = "-".join(workdir.absolute().parts[-2:])
    return wandb.init(
        project=project, id=kept.read_text().strip(), name=name, dir=str(workdir), config=dict(config), resume="allow"
    )


def read_metrics(workdir: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`; a last line cut off by a kill is left out."""
    rows = []
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
