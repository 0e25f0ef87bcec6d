"""Two programs in turns, each in a process of its own: what is measured of the one is not the other's."""

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError

MIB = 2**20

Run = Callable[..., Any]


@dataclass(frozen=True)
class Measured:
    result: Any
    peak_mib: float  # the most that the process held during the run, with its weights; 0 where /proc does not say


def resident_mib(peak: bool = False) -> float:
    """What this process holds, or the most that it held since `_serve` began to count; 0 where /proc does not say."""
    key = "VmHWM" if peak else "VmRSS"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024 / MIB
    return 0.0


def _serve(make: Callable[..., Run], arguments: tuple[Any, ...], pipe: Connection) -> None:
    run = make(*arguments)
    pipe.send(None)
    while (call := pipe.recv()) is not None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        result = run(*call)
        pipe.send(Measured(result, resident_mib(peak=True)))


@contextlib.contextmanager
def program(make: Callable[..., Run], *arguments: Any) -> Iterator[Callable[..., Measured]]:
    """`make(*arguments)` called in a new process, and what it returns called there. Results must pickle.

    Raises UserError where that process ends, on an error (which it prints) or for want of memory.
    """
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(make, arguments, there), daemon=True)
    process.start()
    there.close()

    def answer() -> Any:
        try:
            return here.recv()
        except (EOFError, OSError):
            process.join()
            code = process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"status {code}"
            raise UserError(f"{getattr(make, '__module__', '')}'s process ended with {how}") from None

    def call(*arguments: Any) -> Measured:
        with contextlib.suppress(BrokenPipeError):  # `answer` says how it ended
            here.send(arguments)
        return answer()

    try:
        answer()
        yield call
    finally:
        with contextlib.suppress(OSError):
            here.send(None)
        process.join(timeout=30)
        process.terminate()
