"""Frozen weights in int8, for decoding on small devices: a quarter of float32's memory.

Qwix's scheme and arrays (github.com/google/qwix): symmetric, by the largest absolute value, a scale for each output of
a linear map and for each row of an embedding. Its own `quantize_model` follows a module's `init`, which the scans over
stacked blocks leave; so the arrays are made here, and `clip_jax.models.layers.multiply` multiplies with them. Needs
the extra `int8`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from clip_jax.errors import ConfigError
from clip_jax.training.state import check_patterns, matches_any
from flamingo_jax.adapters import linear_maps
from flamingo_jax.interop.open_flamingo import initial_params

PyTree = Any
FROZEN = ("vision/", "language_model/")
TABLES = ("language_model/embedding", "language_model/head")  # [V, D]


def quantize(params: PyTree, config: Mapping[str, Any], patterns: Sequence[str] = FROZEN) -> PyTree:
    """The parameters with int8 in place of linear maps and of the language model's tables of words.

    The result goes where `params` went, to logits and to generation. Convolutions, norms and biases stay as they are.

    Args:
      params: a Flamingo's; `config`: the model's, of `flamingo_jax.models.variants.get_variant`'s shape.
      patterns: which, by the start of their paths; by default those that Flamingo freezes.

    Raises ConfigError where qwix is not installed, and for a pattern that matches none of them.
    """
    try:
        import qwix
    except ImportError:
        raise ConfigError("int8 needs qwix: pip install 'clip-flamingo-jax[int8]'") from None
    maps = linear_maps(jax.eval_shape(lambda: initial_params(config)))
    maps |= dict.fromkeys(TABLES, (1,))
    check_patterns("int8", patterns, maps)
    chosen = matches_any(patterns)

    def leaf(path: str, value: Any) -> Any:
        if path not in maps or not chosen(path):
            return value
        outputs = tuple(axis for axis in range(value.ndim) if axis not in maps[path])
        return qwix.quantize(jnp.asarray(value), jnp.int8, channelwise_axes=outputs, scale_dtype=jnp.float32)

    flat = traverse_util.flatten_dict(params, sep="/")
    return traverse_util.unflatten_dict({path: leaf(path, value) for path, value in flat.items()}, sep="/")


def bytes_of(params: PyTree) -> int:
    """The memory that parameters take, in any precision."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))
