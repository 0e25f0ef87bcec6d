"""Goodput: of the time since a run was first started, the share that went into training steps that count.

What does not: compiling, restoring, waiting for data, evaluating, saving, standing still between a kill and the next
start, and steps that a kill undid.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from clip_jax.files import write_atomically

FILE = "goodput.json"


class Goodput:
    """Kept in the workdir, so that it goes on where a run does; opened at the step that it starts or resumes at.

    `goodput.json`: {"first_start": seconds since the epoch, "starts": count, "productive_seconds": {step: up to it}}.
    """

    def __init__(self, workdir: Path, step: int):
        self._path = workdir / FILE
        kept = _read(self._path)
        self.first_start = kept.get("first_start", time.time())
        self.starts = kept.get("starts", 0) + 1
        self._at = kept.get("productive_seconds", {})
        self.productive_seconds = self._at.get(str(step), 0.0)
        self._write()

    def add(self, seconds: float) -> None:
        """Counts seconds of training steps."""
        self.productive_seconds += seconds

    def saved(self, step: int, kept: Sequence[int]) -> None:
        """Remembers what is productive up to a step that is being saved; forgets all steps but those in `kept`."""
        self._at = {str(s): self._at[str(s)] for s in kept if str(s) in self._at}
        self._at[str(step)] = self.productive_seconds
        self._write()

    def figures(self) -> dict[str, float]:
        """`goodput` (a share) and `restarts`."""
        since = max(time.time() - self.first_start, 1e-9)
        return {"goodput": min(self.productive_seconds / since, 1.0), "restarts": float(self.starts - 1)}

    def _write(self) -> None:
        if jax.process_index() > 0:
            return
        content = {"first_start": self.first_start, "starts": self.starts, "productive_seconds": self._at}
        try:
            write_atomically(self._path, json.dumps(content) + "\n")
        except OSError as error:
            logging.error("%s can't be written: %s; the run goes on", self._path, error)


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
