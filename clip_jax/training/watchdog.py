"""Noticing that nothing goes on: a hung device, a peer that never answers, a file system that blocks."""

import faulthandler
import sys
from types import TracebackType

import ml_collections


class Watchdog:
    """Ends the process, with code 1 and the stacks of all its threads, when nothing was reported for too long.

    `config`: `step_seconds` for a training step, `other_seconds` for all else that is reported (compiling, restoring,
    evaluating, the last save); 0 is no limit. The clock is the standard library's `faulthandler`, a thread outside
    Python: it fires, too, where a call holds the interpreter's lock for ever.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config

    def __enter__(self) -> "Watchdog":
        self.other()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        faulthandler.cancel_dump_traceback_later()

    def step(self) -> None:
        """A training step begins."""
        self._within(self._config.step_seconds)

    def other(self) -> None:
        """Something else begins."""
        self._within(self._config.other_seconds)

    def _within(self, seconds: float) -> None:
        faulthandler.cancel_dump_traceback_later()
        if seconds and sys.__stderr__ is not None:
            faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
