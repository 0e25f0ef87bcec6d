"""Low-rank adapters (LoRA, arXiv 2106.09685) on frozen linear maps, chosen by pattern: W + (alpha/rank)·A·B.

They are parameters of their own, `params["adapters"]`, under the path of the kernel that each belongs to, so that the
frozen model stays what it is. `attach` puts them where the model finds them, `merge` makes one kernel of both.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.models.layers import LowRank, normal, zeros
from clip_jax.training.optimizer import unit_axes
from clip_jax.training.state import check_patterns, matches_any

PyTree = Any
NAME = "adapters"


def linear_maps(boxed: PyTree) -> dict[str, tuple[int, ...]]:
    """The path of every kernel of a linear map, perhaps stacked → the dimensions over which it sums its input."""
    axes = sharding.logical_axes(boxed)
    return {
        path: unit_axes(path, names)
        for path, names in axes.items()
        if path.endswith("/kernel") and None not in names and "conv_in" not in names
    }


def create(boxed: PyTree, patterns: Sequence[str], rank: int, rng: jax.Array) -> PyTree:
    """New adapters, boxed with their logical axes: A normal with the inputs' deviation, B zero.

    Args:
      boxed: the model's parameters, boxed.
      patterns: regular expressions for the start of kernels' paths ("language_model/blocks/(query|value)"; see
        `clip_jax.training.state.matches_any`).
      rank: r, the width between A [..., inputs, r] and B [..., r, outputs].

    Raises ConfigError for a rank below 1, and for a pattern that matches no linear map.
    """
    if rank < 1:
        raise ConfigError(f"adapters.rank is {rank}; expected at least 1")
    maps, axes = linear_maps(boxed), sharding.logical_axes(boxed)
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(sharding.unbox(boxed), sep="/").items()}
    check_patterns("adapters.patterns", patterns, maps)
    adapters: dict[str, Any] = {}
    for path in sorted(filter(matches_any(patterns), maps)):
        first, end = maps[path][0], maps[path][-1] + 1
        names, shape = axes[path], shapes[path]
        fan_in = 1
        for size in shape[first:end]:
            fan_in *= size
        rng, key = jax.random.split(rng)
        a = normal(fan_in**-0.5, *names[:end], None)(key, (*shape[:end], rank))
        b = zeros(*names[:first], None, *names[end:])(key, (*shape[:first], rank, *shape[end:]))
        adapters |= {f"{path}/a": a, f"{path}/b": b}
    return traverse_util.unflatten_dict(adapters, sep="/")


def attach(params: Mapping[str, Any], scale: float) -> PyTree:
    """Parameters with `adapters` → those that a model is applied with; others unchanged. `scale`: alpha / rank."""
    return _with_adapters(params, lambda kernel, a, b: LowRank(kernel, a, b, scale))


def merge(params: Mapping[str, Any], scale: float) -> PyTree:
    """Parameters with `adapters` → the same model's without: W + scale·A·B, in W's dtype. For export."""

    def add(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        stacked = a.ndim + b.ndim - 2 - kernel.ndim  # 1 where the first dimension is the layers'
        product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1)) if stacked else lambda a, b: jnp.tensordot(a, b, 1)
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        return (kernel.astype(wide) + scale * product(a.astype(wide), b.astype(wide))).astype(kernel.dtype)

    return _with_adapters(params, add)


def _with_adapters(params: Mapping[str, Any], join: Any) -> PyTree:
    if NAME not in params:
        return params
    rest = {name: tree for name, tree in params.items() if name != NAME}
    flat = traverse_util.flatten_dict(rest, sep="/")
    factors = traverse_util.flatten_dict(params[NAME], sep="/")
    for path in {name.rsplit("/", 1)[0] for name in factors}:
        flat[path] = join(flat[path], factors[f"{path}/a"], factors[f"{path}/b"])
    return traverse_util.unflatten_dict(flat, sep="/")
