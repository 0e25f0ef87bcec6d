"""From any file of a LLaMA to `LanguageModel`'s parameters: the formats differ in names only.

Every format stores a linear map as [out, in] and each layer by itself; here kernels are [in, …out] with their
heads apart, and the layers are stacked. Which shapes there must be, the model itself says.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from clip_jax import sharding
from clip_jax.errors import CheckpointError
from flamingo_jax.models.language_model import LanguageModel

PyTree = Any
Shape = tuple[int, ...]
LISTED = 3  # so many names stand in an error


def assemble(
    fields: Mapping[str, Any],
    names: Mapping[str, str],
    stored: Mapping[str, Shape],
    read: Callable[[str], np.ndarray],
    source: str,
) -> PyTree:
    """`LanguageModel(**fields)`'s parameters, as numpy arrays of the dtype that `read` gives.

    Args:
      names: a parameter's path, "blocks/query/kernel", → its tensor's name; "{}" stands for the layer's number.
      stored: the shape of every tensor there is.
      read: a tensor by its name.
      source: what an error names.

    Raises:
      CheckpointError: a tensor is missing, is of another shape, or has no place in the model.
      ConfigError: the fields do not fit each other.
    """
    parameters = _shapes(fields)
    layers = {
        path: [names[path].format(i) for i in range(fields["layers"])] if path.startswith("blocks/") else [names[path]]
        for path in parameters
    }
    expected = {name for tensors in layers.values() for name in tensors}
    if missing := sorted(expected - stored.keys()):
        raise CheckpointError(f"{source}: no tensor {_listing(missing)}")
    if unused := sorted(stored.keys() - expected):
        raise CheckpointError(f"{source}: no place in a LLaMA for tensor {_listing(unused)}")

    flat = {}
    for path, tensors in layers.items():
        shape = parameters[path][1:] if path.startswith("blocks/") else parameters[path]
        layout = _stored_shape(path, shape)
        for name in tensors:
            if tuple(stored[name]) != layout:
                raise CheckpointError(f"{source}: {name} is {list(stored[name])}; expected {list(layout)}")
        arrays = [read(name) for name in tensors]
        if path.endswith("/kernel"):
            arrays = [array.T.reshape(shape) for array in arrays]
        dtype = functools.reduce(jnp.promote_types, (array.dtype for array in arrays))
        stacked = np.stack([array.astype(dtype) for array in arrays])
        flat[path] = stacked if path.startswith("blocks/") else stacked[0]
    return traverse_util.unflatten_dict(flat, sep="/")


def _shapes(fields: Mapping[str, Any]) -> dict[str, Shape]:
    """Path → shape of every parameter of the model."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = sharding.unbox(jax.eval_shape(LanguageModel(**fields).init, jax.random.key(0), ids))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"], sep="/").items()}


def _stored_shape(path: str, shape: Shape) -> Shape:
    """[out, in] of a kernel: the heads are on its way in for the output projection, on its way out for the others."""
    if not path.endswith("/kernel"):
        return shape
    split = len(shape) - 1 if path.endswith("out/kernel") else 1
    return math.prod(shape[split:]), math.prod(shape[:split])


def _listing(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
