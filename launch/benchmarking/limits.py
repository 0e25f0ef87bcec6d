"""What the machine itself reaches: the best of bare matrix products, and of reading memory."""

import functools
import time
from collections.abc import Callable
from typing import Any

from launch.benchmarking.turns import program

SIZE, TRIES = 2048, 5


def _best(run: Callable[[], Any], work: float) -> float:
    """`work` of one run by its least time, after one that is not counted."""
    import jax

    least = float("inf")
    for i in range(TRIES + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        least = min(least, time.perf_counter() - start) if i else least
    return work / least


def _products() -> Callable[[], float]:
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (SIZE, SIZE), jnp.float32)
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda: _best(lambda: multiply(x, x), 2.0 * SIZE**3)


@functools.cache
def matmul_rate() -> float:
    """Operations a second of float32 products of 2,048² matrices, on all cores."""
    with program(_products) as measure:
        return measure().result


def _reading() -> Callable[[], float]:
    import jax
    import jax.numpy as jnp

    matrix, vector = jnp.ones((2**14, 2**13), jnp.float32), jnp.ones(2**13)  # 512 MiB, more than any cache
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda: _best(lambda: multiply(matrix, vector), matrix.nbytes)


@functools.cache
def reading_rate() -> float:
    """Bytes a second of a float32 matrix that is multiplied with a vector, on all cores."""
    with program(_reading) as measure:
        return measure().result
