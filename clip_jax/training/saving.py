"""A save under way in several processes: that one of them may fail alone, and none waits for it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.errors import CheckpointError

GOES_ON, DONE, FAILED = range(3)  # what a process says of its part
POLL_SECONDS = 0.1


class Save(threading.Thread):
    """This process's part of a save by Orbax.

    Args:
      path: what is saved.
      finish: called by process 0 when Orbax has committed.
      say: called with `path` and the error, at once, where this process or another fails.
    """

    def __init__(self, path: Path, finish: Callable[[], None], say: Callable[[Path, BaseException], None]):
        super().__init__(name="checkpoint")
        self._path, self._finish, self._say = path, finish, say
        self._response: Any = None
        self._error: BaseException | None = None
        self._over = threading.Event()

    def begin(self, save: Callable[[], Any]) -> None:
        """Calls `save`, which copies from the devices and returns Orbax's response; the rest goes on in a thread."""
        try:
            self._response = save()
        except Exception as error:
            self._fail(error)
        else:
            self.start()

    def run(self) -> None:
        try:
            self._response.result()
            if jax.process_index() == 0 and not self._over.is_set():
                self._finish()
        except BaseException as error:  # of a thread nobody else would hear
            if not self._over.is_set():  # else it was given up, and this is how it ends
                self._fail(error)
        self._over.set()

    def settle(self) -> BaseException | None:
        """Waits until every process has done its part, or one has failed. The error, if so, in every process.

        One that fails leaves Orbax's barriers, where the others would wait for twenty minutes. So all tell each other
        how they are, and give up what one can't finish: nothing commits it, and its threads end with those barriers.
        """
        while True:
            self._over.wait(POLL_SECONDS if jax.process_count() > 1 else None)
            found = gathered(self._condition())
            if FAILED in found:
                if self._error is None:
                    self._fail(CheckpointError(f"process {found.index(FAILED)} failed; its log says at what"))
                return self._error
            if GOES_ON not in found:
                return None

    def _condition(self) -> int:
        if not self._over.is_set():
            return GOES_ON
        return DONE if self._error is None else FAILED

    def _fail(self, error: BaseException) -> None:
        self._error = error
        self._over.set()
        self._say(self._path, error)


def gathered(number: int) -> list[int]:
    """Every process's, which all call this."""
    return [int(n) for n in np.ravel(multihost_utils.process_allgather(np.int32(number)))]
