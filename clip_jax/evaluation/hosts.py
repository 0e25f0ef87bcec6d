"""Work on the host, shared out among the processes."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils


def over_hosts(compute: Callable[[slice], np.ndarray], parts: Sequence[slice], length: int) -> np.ndarray:
    """[length] int32, of which `compute(part)` gives each part: every part by one process, all known to all.

    Every process must call it, with the same parts. They cover the length without overlap.
    """
    found = np.zeros(length, np.int32)
    for part in parts[jax.process_index() :: jax.process_count()]:
        found[part] = compute(part)
    return np.asarray(multihost_utils.process_allgather(found, tiled=False)).reshape(-1, length).sum(axis=0)


def parts_of(length: int, size: int) -> list[slice]:
    """Consecutive parts of at most `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
