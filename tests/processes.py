"""Real processes: runs of `launch.train`, alone or several as one, that tests signal and kill.

They are forked from a server that has the imports behind it, so that a start costs what a run's own start costs:
JAX's backend, tracing, reading the compiled program from the cache.
"""

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from conftest import CACHE, DEVICES, ROOT

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["launch.train", "launch.tasks", "clip_jax.training.clip_task",
                                "flamingo_jax.training.flamingo_task", "clip_jax.evaluation.pairs"])  # fmt: skip


@dataclass
class Running:
    process: BaseProcess
    log: Path

    def wait(self, seconds: float = 300) -> int:
        """The exit code; what was still running after so many seconds is killed, and fails the test."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"still running after {seconds} s:\n{self.text()[-3000:]}")
        return self.process.exitcode

    def succeed(self) -> None:
        assert self.wait() == 0, self.text()[-3000:]

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, text: str, seconds: float = 300) -> None:
        """Until the process has said so."""
        deadline = time.monotonic() + seconds
        while text not in self.text():
            assert self.process.is_alive() and time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.01)

    def send(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


def launch_train() -> None:
    """`python -m launch.train`, with the arguments that `start` was given."""
    from launch import command, train

    command.run(train.main, with_config=True)


def start(
    log: Path,
    *flags: str,
    devices: int = 1,
    environment: dict[str, str] | None = None,
    main: Callable[..., None] = launch_train,
    arguments: Sequence[Any] = (),
) -> Running:
    """`main(*arguments)` with `flags` as the command line's, in a process whose output goes to `log`."""
    setting = {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(f"count={DEVICES}", f"count={devices}"),
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    } | (environment or {})
    log.unlink(missing_ok=True)
    process = _server.Process(target=_main, args=(str(log), list(flags), setting, main, tuple(arguments)))
    process.start()
    return Running(process, log)


def start_several(count: int, log: Path, *flags: str, devices: int, **options: Any) -> list[Running]:
    """The same as `count` processes of `devices` each; their output in `log` with their numbers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    environment = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    return [
        start(log.with_suffix(f".{i}"), *flags, devices=devices,
              environment=environment | {"JAX_PROCESS_ID": str(i)}, **options)
        for i in range(count)
    ]  # fmt: skip


def _main(
    log: str, flags: list[str], setting: dict[str, str], main: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(setting)
    os.chdir(ROOT)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc]
    sys.argv = ["launch.train", *flags]
    main(*arguments)
