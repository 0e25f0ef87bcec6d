"""What the machine itself reaches: the best of bare matrix products, and of reading memory."""

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from clip_jax.errors import UserError
from launch.benchmarking.turns import program

SIZE, TRIES = 2048, 5


def on_device(device: str, make: Callable[..., Any], *arguments: Any) -> Any:
    """`make(*arguments)` in a process whose JAX has this device alone: "cpu" or "gpu"."""
    os.environ["JAX_PLATFORMS"] = "cuda" if device == "gpu" else "cpu"
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the other side is on the same GPU
    return make(*arguments)


def _best(run: Callable[[], Any], work: float) -> float:
    """`work` of one run by its least time, after one that is not counted."""
    import jax

    least = float("inf")
    for i in range(TRIES + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        least = min(least, time.perf_counter() - start) if i else least
    return work / least


def _products(device: str, dtype: str) -> Callable[[], float]:
    import jax

    n = SIZE if device == "cpu" else 4 * SIZE
    x = jax.random.normal(jax.random.key(0), (n, n), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda: _best(lambda: multiply(x, x), 2.0 * n**3)


@functools.cache
def matmul_rate(device: str = "cpu", dtype: str = "float32") -> float:
    """Operations a second of products of large matrices: on all cores, or on the first GPU."""
    with program(on_device, device, _products, device, dtype) as measure:
        return measure().result


def _reading(dtype: str) -> Callable[[], float]:
    import jax
    import jax.numpy as jnp

    matrix, vector = jnp.ones((2**14, 2**13), dtype), jnp.ones(2**13, dtype)  # 512 MiB or 256, more than any cache
    multiply = jax.jit(lambda a, b: a @ b)
    return lambda: _best(lambda: multiply(matrix, vector), matrix.nbytes)


@functools.cache
def reading_rate(device: str = "cpu", dtype: str = "float32") -> float:
    """Bytes a second of a matrix that is multiplied with a vector, on all cores or on the first GPU."""
    with program(on_device, device, _reading, dtype) as measure:
        return measure().result


def _peak() -> Callable[[], float]:
    import jax

    from launch.planning.ideal import peak_flops

    kind = jax.devices()[0].device_kind
    found = peak_flops(kind)
    if found is None:
        raise UserError(f"{kind}: its peak is not known (launch/planning/ideal.py)")
    return lambda: found


@functools.cache
def gpu_peak() -> float:
    """bfloat16 operations a second of the first GPU, by its data sheet: what utilisation (MFU) is a share of."""
    with program(on_device, "gpu", _peak) as measure:
        return measure().result
