"""Being asked to stop: SIGTERM, which is also how maintenance of a host announces itself, and Ctrl-C.

Every host must save at the same step. Where several processes run, JAX's own runtime sees the SIGTERM of any of them
and agrees with the others on the next step, or batch of an evaluation, that all can reach.
"""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StoppedError(Exception):
    """Asked to stop, in the midst of an evaluation."""


class Preemption:
    """While entered, signals don't end the process: `reached` says when to save and stop. Further ones change nothing.

    Python sees signals in the main thread only: entered from another one, those of a single process stay as they are.
    """

    def __init__(self) -> None:
        self.requested = False  # in this process; several agree in `reached`
        self._asked, self._reached = 0, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            # JAX's runtime has a handler of its own for SIGTERM.
            caught = (signal.SIGINT,) if jax.distributed.is_initialized() else (signal.SIGINT, signal.SIGTERM)
            self._before = {number: signal.signal(number, self._on_signal) for number in caught}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if not self.requested:
            logging.warning("%s: saving after this step or batch, then stopping", signal.Signals(number).name)
            if jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)
        self.requested = True

    def reached(self) -> bool:
        """Whether to save and stop now: from the same question on in every process. All ask equally often.

        They do so after every step, and between the batches of an evaluation.
        """
        self._asked += 1
        if not jax.distributed.is_initialized():
            return self.requested
        self._reached = self._reached or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._reached
