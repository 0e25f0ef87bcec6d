"""Batches made by processes of their own, in memory that they share with the trainer: no pixel is ever pickled.

The processes take pieces of work from one pipe, write rows into a ring of batches and say so through a pipe each.
Which process makes which rows is chance; what the rows hold is not. A process ends when the pipe of work does: with
the trainer, however that ends.

The memory is of no file system: the small /dev/shm of a container doesn't limit it.
"""

import contextlib
import json
import logging
import math
import mmap
import os
import pickle
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, BinaryIO

import numpy as np

from clip_jax.errors import DataError

Skips = Counter[tuple[str, str]]  # (reason, shard) → how many records were skipped

_TASK = struct.Struct("qq")  # place in the ring, piece
_MOST_TASKS = 4000  # that a pipe holds: 64 KiB
_ALIGNMENT = 64  # bytes
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from clip_jax.data.workers import serve; "
    "serve(*map(int, sys.argv[2:]))"
)


@dataclass
class Batch:
    """Rows of a batch, by name, with the records that were skipped on the way and the seconds that it took."""

    arrays: Mapping[str, np.ndarray]
    skips: Skips = field(default_factory=Counter)
    busy: float = 0.0  # seconds of a core
    taken: float = 0.0  # seconds of a thread, with its waiting for the source


@dataclass(frozen=True)
class Ring:
    """Where in a block of memory the arrays of some batches lie."""

    rows: int
    items: Mapping[str, tuple[tuple[int, ...], np.dtype]]  # of one row

    def offsets(self) -> tuple[dict[str, int], int]:
        """(where each array begins in a batch, the batch's size), in bytes."""
        found, end = {}, 0
        for name, (shape, dtype) in self.items.items():
            found[name] = end
            end += -(-self.rows * math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return found, end

    def views(self, memory: mmap.mmap, place: int) -> dict[str, np.ndarray]:
        """The arrays of the batch at a place: [rows, …]."""
        offsets, size = self.offsets()
        return {
            name: np.ndarray((self.rows, *shape), dtype, memory, place * size + offsets[name])
            for name, (shape, dtype) in self.items.items()
        }


def fewest_rows(rows: int, prefetch: int) -> int:
    """How many rows a piece of work must at least have for the pipe of work never to be full."""
    return -(-rows * (prefetch + 1) // _MOST_TASKS)


def batches(
    read: Callable[[int, Mapping[str, np.ndarray]], Batch],
    example: Mapping[str, np.ndarray],
    lengths: Sequence[int],
    steps: range,
    *,
    workers: int,
    threads: int,
    prefetch: int,
) -> Iterator[Batch]:
    """The batches of some steps.

    Args:
      read: writes a piece to arrays. Piece `step · len(lengths) + i` is the next `lengths[i]` rows of a batch.
      example: one row's arrays.
      threads: of each process.

    Raises DataError where a process ends before its time, and whatever `read` raises there.
    """
    ring = Ring(sum(lengths), {name: (value.shape, value.dtype) for name, value in example.items()})
    places = prefetch + 1
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(_unnamed_file())
        file.truncate(places * ring.offsets()[1])
        memory = mmap.mmap(file.fileno(), 0)
        pool = stack.enter_context(_Pool(pickle_of((read, ring, lengths, threads)), file.fileno(), workers))
        missing: dict[int, int] = {}

        def hand_out(step: int) -> None:
            if step in steps:
                missing[step] = len(lengths)
                place = step % places
                pool.hand_out([(place, step * len(lengths) + i) for i in range(len(lengths))])

        parts: dict[int, Batch] = {}
        for step in steps[:prefetch]:
            hand_out(step)
        for step in steps:
            hand_out(step + prefetch)
            while missing.get(step, 0):
                for piece, skips, busy, taken in pool.done():
                    of = piece // len(lengths)
                    missing[of] -= 1
                    part = parts.setdefault(of, Batch({}))
                    part.skips.update(skips)
                    part.busy += busy
                    part.taken += taken
            del missing[step]
            whole = parts.pop(step)
            # Copied: a device may read it for longer than its place is free.
            whole.arrays = {name: view.copy() for name, view in ring.views(memory, step % places).items()}
            yield whole


def pickle_of(value: Any) -> bytes:
    import cloudpickle  # type: ignore[import-untyped]  # by value where a class or function is of the program that runs

    return cloudpickle.dumps(value)


def _unnamed_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("batches"), "w+b")
    return tempfile.TemporaryFile()


class _Pool:
    """The processes, and the pipes to and from them."""

    def __init__(self, payload: bytes, memory: int, workers: int):
        self._processes: dict[Connection, subprocess.Popen[bytes]] = {}
        tasks, self._tasks = os.pipe()
        # Many processes share the cores: none of them starts threads or a device of its own.
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        try:
            with _unnamed_file() as file:
                file.write(payload)
                file.flush()
                for _ in range(workers):
                    here, there = os.pipe()
                    command = [sys.executable, "-c", _START, json.dumps(sys.path)]
                    descriptors = (tasks, there, memory, file.fileno())
                    self._processes[Connection(here, writable=False)] = subprocess.Popen(
                        [*command, *map(str, descriptors)],
                        pass_fds=descriptors,
                        stdin=subprocess.DEVNULL,
                        env=environment,
                    )
                    os.close(there)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(tasks)

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def hand_out(self, tasks: Sequence[tuple[int, int]]) -> None:
        with contextlib.suppress(BrokenPipeError):  # all have ended, and `done` says why
            for task in tasks:
                os.write(self._tasks, _TASK.pack(*task))

    def done(self) -> list[tuple[int, Skips, float, float]]:
        """(piece, records skipped, seconds of a core, seconds) of some pieces; waits for the first."""
        found = []
        for pipe in wait(list(self._processes)):
            assert isinstance(pipe, Connection)
            try:
                message = pipe.recv()
            except EOFError:
                raise DataError(self._why(self._processes[pipe])) from None
            if isinstance(message, BaseException):
                raise message
            if isinstance(message, logging.LogRecord):
                logging.getLogger(message.name).handle(message)
            else:
                found.append(message)
        return found

    def _why(self, process: subprocess.Popen[bytes]) -> str:
        code = process.wait()
        who = f"a worker that reads data (process {process.pid} of {len(self._processes)})"
        if code == -signal.SIGKILL:
            return (
                f"{who} was killed, as Linux does where memory runs out (dmesg says so); fewer data.workers or a "
                "smaller data.prefetch need less"
            )
        ended = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return f"{who} {ended}; what it wrote stands above"

    def close(self) -> None:
        os.close(self._tasks)
        for pipe, process in self._processes.items():
            process.kill()  # it holds nothing that has to be put in order
            process.wait()
            pipe.close()


def serve(tasks: int, results: int, memory: int, payload: int) -> None:
    """A worker's whole life; the arguments are file descriptors."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the trainer, which may save first
        signal.signal(number, signal.SIG_IGN)
    out, lock = Connection(results, readable=False), threading.Lock()

    def send(message: Any) -> None:
        with lock:
            try:
                out.send(message)
            except OSError:  # nobody listens any more
                os._exit(0)

    root = logging.getLogger()
    root.handlers = [_Handler(send)]

    try:
        read, ring, lengths, threads = pickle.loads(os.pread(payload, os.fstat(payload).st_size, 0))
    except BaseException as error:
        send(_sendable(error))
        return
    block = mmap.mmap(memory, 0)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]

    def work() -> None:
        # As long as what is written, what is read is whole, whoever else reads the pipe.
        while task := os.read(tasks, _TASK.size):
            place, piece = _TASK.unpack(task)
            try:
                part = piece % len(lengths)
                rows = slice(starts[part], starts[part] + lengths[part])
                batch = read(piece, {name: view[rows] for name, view in ring.views(block, place).items()})
                message = (piece, batch.skips, batch.busy, batch.taken)
            except BaseException as error:
                send(_sendable(error))
                return
            send(message)

    others = [threading.Thread(target=work, daemon=True) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()


def _sendable(error: BaseException) -> BaseException:
    """The error with its traceback as a note, or one that says the same where it does not pickle."""
    import traceback

    text = "".join(traceback.format_exception(error))
    error.add_note(f"In a worker that reads data:\n{text}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return DataError(f"a worker that reads data raised {type(error).__name__}: {error}")
    return error


class _Handler(logging.Handler):
    """Hands over what is logged to the trainer, which may show it."""

    def __init__(self, send: Callable[[Any], None]):
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._send(record)
