"""What the tests of the losses share: pairs, open_clip's answers, the program under test."""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from conftest import ORACLES
from jax.sharding import Mesh

from clip_jax import sharding

TOLERANCE = 1e-5  # of the largest expected value, for the loss and for every gradient
NAMES = ("loss", "image", "text", "scale", "bias")


def unit_rows(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    x = rng.normal(size=(n, d))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def rounded(x: np.ndarray) -> np.ndarray:
    """What the float32 program is given, in float64."""
    return x.astype(np.float32).astype(np.float64)


@cache
def program(loss: Callable[..., jax.Array], mesh: Mesh, scalars: int, **options: Any) -> Any:
    """(image, text, scalars…) → (loss, gradients), compiled once for each mesh and shape."""
    over = partial(loss, mesh=mesh, axis_names=sharding.BATCH_AXES, **options)
    return jax.jit(jax.value_and_grad(over, tuple(range(2 + scalars))))


def ours(
    loss: Callable[..., jax.Array], mesh: Mesh, image: np.ndarray, text: np.ndarray, *scalars: float, **options: Any
) -> tuple[jax.Array, ...]:
    """(loss, d image, d text, d scalars…) of the float32 program on a mesh."""
    arrays = [jax.device_put(np.float32(x), sharding.batch_sharding(mesh)) for x in (image, text)]
    value, gradients = program(loss, mesh, len(scalars), **options)(*arrays, *map(np.float32, scalars))
    return value, *gradients


def assert_close(got: tuple, expected: tuple, tolerance: float = TOLERANCE) -> None:
    for name, g, e in zip(NAMES, got, expected, strict=False):
        error = np.abs(np.asarray(g, np.float64) - e).max()
        assert error <= tolerance * np.abs(e).max(), f"{name}: {error} of {np.abs(e).max()}"
    assert len(got) == len(expected)


def products(jaxpr: Any, trips: int = 1) -> Iterator[tuple[Any, int]]:
    """(equation, how often it runs) of every matrix product of a program, those in loops too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation, trips
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner, trips * equation.params.get("length", 1))


def flops(jaxpr: Any) -> int:
    """Floating-point operations of a program's matrix products, on each device."""
    total = 0
    for equation, trips in products(jaxpr):
        (contracted, _), _ = equation.params["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        total += trips * 2 * inner * math.prod(equation.outvars[0].aval.shape)
    return total


class OpenClip:
    """open_clip's inputs and answers; its gradients are those of the embeddings before normalisation."""

    def __init__(self) -> None:
        inputs, self.expected = (np.load(ORACLES / "clip_loss" / f"{name}.npz") for name in ("inputs", "expected"))
        self.norms = [np.linalg.norm(inputs[k], axis=1, keepdims=True) for k in ("image", "text")]
        self.image, self.text = inputs["image"] / self.norms[0], inputs["text"] / self.norms[1]
        self.scale, self.bias = float(np.exp(inputs["log_scale"])), float(inputs["bias"])

    def answer(self, name: str, *more: str) -> tuple[np.ndarray, ...]:
        gradients = [self.expected[f"{name}_grad_{key}"] for key in ("image", "text", "log_scale", *more)]
        return self.expected[name], *gradients

    def before_normalization(self, result: tuple) -> tuple[np.ndarray, ...]:
        """(loss, d image, d text, d scale, …) of normalised embeddings → of those before, and of log scale."""
        loss, d_image, d_text, d_scale, *rest = (np.asarray(x, np.float64) for x in result)
        d_image, d_text = (
            (d - x * (d * x).sum(axis=1, keepdims=True)) / norm
            for d, x, norm in zip((d_image, d_text), (self.image, self.text), self.norms, strict=True)
        )
        return loss, d_image, d_text, d_scale * self.scale, *rest
