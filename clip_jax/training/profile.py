"""A profile of some steps, for xprof (`tensorboard --logdir WORKDIR/profile`) and for ui.perfetto.dev."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from clip_jax.errors import ConfigError


class Profile:
    """Traces the steps of `spec` "first:last" (both included) to `workdir`/profile; "" is none.

    Raises ConfigError for another `spec`.
    """

    def __init__(self, spec: str, workdir: Path):
        self._steps = range(0)
        self._directory, self._running = workdir / "profile", False
        if spec:
            found = re.fullmatch(r"(\d+):(\d+)", spec)
            if not found or not 0 < int(found[1]) <= int(found[2]):
                raise ConfigError(f"profile.steps {spec!r}: expected FIRST:LAST, such as 10:13")
            self._steps = range(int(found[1]), int(found[2]) + 1)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Inside, a step is given to the device; the profile knows its number."""
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def after(self, step: int, outputs: Any) -> None:
        """Call with what the step returned: its last one is waited for."""
        if self._running and step >= self._steps[-1]:
            jax.block_until_ready(outputs)
            self.close()

    def close(self) -> None:
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            logging.info("profile of steps %d to %d: %s", self._steps[0], self._steps[-1], self._directory)
