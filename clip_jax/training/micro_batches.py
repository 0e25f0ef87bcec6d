"""Batches larger than memory: embeddings are accumulated, never micro-batch losses, which would lose negatives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.errors import ConfigError

PyTree = Any


def in_micro_batches(embed: Callable[[PyTree], PyTree], batch: PyTree, k: int, mesh: Mesh) -> PyTree:
    """`embed(batch)`, of which only a k-th is computed at a time, forwards and again backwards (arXiv 2101.06983).

    Args:
      embed: examples [b, …] → embeddings [b, …], each of its own example only.
      batch: arrays [B, …], B a multiple of k times the data-parallel parts of the mesh. Micro-batch j has
        rows j, j + k, …, so that no example leaves its device.
      k: the number of micro-batches.
      mesh: the mesh.

    Returns:
      Embeddings [B, …] in the order of the batch. Only they and the inputs grow with k.

    Raises:
      ConfigError: a device's examples cannot be cut in k.
    """
    shards, size = sharding.batch_shards(mesh), len(jax.tree.leaves(batch)[0])
    if k < 1 or size % (k * shards):
        raise ConfigError(
            f"micro_batches {k}: expected a divisor of {size // shards}, the examples that each of the {shards} "
            f"data-parallel parts of the mesh has of a batch of {size}"
        )
    where = sharding.batch_sharding(mesh)

    @jax.checkpoint
    def micro_batch(j: jax.Array) -> PyTree:
        def rows(x: jax.Array) -> jax.Array:
            strided = x.reshape(-1, k, *x.shape[1:])
            return lax.with_sharding_constraint(lax.dynamic_index_in_dim(strided, j, 1, keepdims=False), where)

        return lax.with_sharding_constraint(embed(jax.tree.map(rows, batch)), where)

    _, embedded = lax.scan(lambda _, j: (None, micro_batch(j)), None, jnp.arange(k))
    return jax.tree.map(
        lambda x: lax.with_sharding_constraint(jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), where), embedded
    )
