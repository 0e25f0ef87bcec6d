"""Work on the host, shared out among the processes."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from clip_jax.progress import brief


def over_hosts(compute: Callable[[slice], np.ndarray], parts: Sequence[slice], length: int) -> np.ndarray:
    """[length] int32, of which `compute(part)` gives each part: every part by one process, all known to all.

    Every process must call it, with the same parts. They cover the length without overlap.
    """
    found = np.zeros(length, np.int32)
    for part in parts[jax.process_index() :: jax.process_count()]:
        found[part] = compute(part)
    return np.asarray(multihost_utils.process_allgather(found, tiled=False)).reshape(-1, length).sum(axis=0)


def read_over_hosts(read: Callable[[int], Any], length: int) -> list[Any]:
    """[read(0), …, read(length - 1)], each by one process, all known to all. Every process must call it.

    `read` returns what JSON can hold; tuples come back as lists.
    """
    index, count = jax.process_index(), jax.process_count()
    indices = range(index, length, count)
    with brief(indices, total=len(indices), desc="read", unit=" records") as bar:
        mine = np.frombuffer(json.dumps([read(i) for i in bar]).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(mine))))
    padded = np.pad(mine, (0, int(sizes.max()) - len(mine)))
    everyone = np.asarray(multihost_utils.process_allgather(padded, tiled=False)).reshape(count, -1)
    parts = [json.loads(row[:size].tobytes()) for row, size in zip(everyone, sizes, strict=True)]
    return [parts[i % count][i // count] for i in range(length)]


def parts_of(length: int, size: int) -> list[slice]:
    """Consecutive parts of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
