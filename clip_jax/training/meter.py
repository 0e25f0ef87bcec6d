"""How fast a run is: figures of the steps since they were last asked for."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax

from clip_jax.training.goodput import Goodput


class Meter:
    """Times training steps, and nothing that is marked as a pause.

    Args:
      step: the one that the run starts or resumes at.
      examples: that a step trains on, all streams together; the mean where streams take turns.
      ideal_seconds: of a step whose model FLOPs ran at the devices' peak; None where that is not known.
    """

    def __init__(self, step: int, examples: float, goodput: Goodput, ideal_seconds: float | None):
        self.step, self.examples, self.goodput, self.ideal_seconds = step, examples, goodput, ideal_seconds
        self.program_bytes = 0  # of one device, as compiled
        self._lap_start, self._lap_waited = time.perf_counter(), 0.0
        self._elapsed = self._waited = 0.0  # since `step`, up to the last lap

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What runs inside is no training."""
        before = time.perf_counter()
        yield
        self._lap_start += time.perf_counter() - before

    @contextmanager
    def waiting(self, running: Any = None) -> Iterator[None]:
        """What runs inside is waiting for data, from when the devices are idle on: `running` is what they compute."""
        before, idle = time.perf_counter(), []

        def watch() -> None:
            with suppress(Exception):  # whoever asks for its value is told
                jax.block_until_ready(running)
            idle.append(time.perf_counter())

        if running is None:
            idle.append(before)
        else:
            threading.Thread(target=watch, daemon=True).start()
        yield
        now = time.perf_counter()
        if idle:
            self._lap_waited += max(now - max(before, idle[0]), 0.0)

    def lap(self) -> None:
        """Counts what was trained since the last lap: for the next figures, and as productive."""
        now = time.perf_counter()
        seconds = now - self._lap_start
        self.goodput.add(seconds - self._lap_waited)
        self._elapsed, self._waited = self._elapsed + seconds, self._waited + self._lap_waited
        self._lap_start, self._lap_waited = now, 0.0

    def figures(self, step: int) -> dict[str, float]:
        """Means of the steps up to this one since the last call, and the memory in use."""
        self.lap()
        seconds = self._elapsed / (step - self.step)
        found = {
            "step_seconds": seconds,
            "examples_per_second": self.examples / seconds,
            "data_wait_share": self._waited / self._elapsed,
            "memory_bytes": float(peak_bytes(jax.local_devices()) or self.program_bytes),
        }
        if self.ideal_seconds is not None:
            found["mfu"] = self.ideal_seconds / seconds
        self.step, self._elapsed, self._waited = step, 0.0, 0.0
        return found | self.goodput.figures()


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """What a compiled program needs on one device."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return 0
    arguments = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return arguments + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes


def peak_bytes(devices: Sequence[jax.Device]) -> int:
    """The most that was ever in use on one of them; 0 where they don't tell, as CPUs don't."""
    return max(int((device.memory_stats() or {}).get("peak_bytes_in_use", 0)) for device in devices)
