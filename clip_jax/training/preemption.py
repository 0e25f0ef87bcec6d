"""Being asked to stop: SIGTERM, which is also how maintenance of a host announces itself, and Ctrl-C.

Every host must save at the same step. Where several processes run, JAX's own runtime sees the SIGTERM of any of them
and agrees with the others on the next step that all can reach.
"""

import logging
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """While entered, signals don't end the process: `reached` says where to save and stop. Further ones change nothing.

    Python sees signals in the main thread only: entered from another one, those of a single process stay as they are.
    """

    def __init__(self) -> None:
        self.requested = False  # in this process; several agree in `reached`
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
            logging.warning("%s: saving after this step, then stopping", signal.Signals(number).name)
            if jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)
        self.requested = True

    def reached(self, step: int) -> bool:
        """Whether to save and stop after this step: at the same one in every process. All ask after every step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested
