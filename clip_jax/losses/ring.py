"""Every image against every text, in tiles, over a ring of devices: nothing N×N is ever in memory.

Each device keeps its own images; the texts travel round the ring, and with them what is being summed for
them. They hop tile by tile, each into the place of the one just sent on, so that no second copy is needed.

N examples, n of them on each device, D width; a tile has r images (rows) and c texts (columns).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from clip_jax.errors import ConfigError

Array = jax.Array
PyTree = Any

# Rows and columns of a tile: 4 MiB of float32 logits. By the compiler's estimates for a v5e (N = 32,768, D = 768,
# float32) its matrix unit is then busy 80 % of the time; with 512, 57 %; with 2048, 84 %, for twice the memory.
TILE = 1024


def shard_axes(
    name: str, image_embeddings: Array, text_embeddings: Array, mesh: Mesh, axis_names: str | tuple[str, ...]
) -> tuple[str, ...]:
    """The mesh axes as a tuple. Raises ConfigError where shapes differ or the mesh does not divide N."""
    axes = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)
    if image_embeddings.shape != text_embeddings.shape or image_embeddings.ndim != 2:
        raise ConfigError(
            f"{name}: image embeddings {image_embeddings.shape} and text embeddings "
            f"{text_embeddings.shape}: expected the same [N, D]"
        )
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if image_embeddings.shape[0] % shards:
        raise ConfigError(
            f"{name}: {image_embeddings.shape[0]} examples are not divisible by the {shards} "
            f"shards of mesh axes {', '.join(axes)}"
        )
    return axes


def wide(x: Array) -> Array:
    """In float32, or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def dot(spec: str, a: Array, b: Array) -> Array:
    """A product in the dtype of `b`, accumulated in float32 or wider.

    float32 products are true float32 ones: a TPU's default would round the factors to bfloat16.
    """
    return jnp.einsum(spec, a.astype(b.dtype), b, precision=lax.Precision.HIGHEST, preferred_element_type=wide(b).dtype)


def sum_over_pairs(
    visit: Callable[..., tuple[PyTree, PyTree]],
    images: PyTree,
    texts: PyTree,
    image_sums: PyTree,
    text_sums: PyTree,
    axes: tuple[str, ...],
) -> tuple[PyTree, PyTree]:
    """Inside a `shard_map`: the sums that `visit` makes of all N×N pairs, (image_sums, text_sums).

    Args:
      visit: (images [r, …], texts [c, …], image_sums [r, …], text_sums [c, …], label [r, c]) → both sums.
        `label` is 1 for a positive pair, -1 for a negative one and 0 for padding, as in SigLIP.
      images, texts: this device's, trees of arrays [n, …].
      image_sums, text_sums: where the sums start, likewise.
      axes: the mesh axes of the ring.
    """
    n = jax.tree.leaves(images)[0].shape[0]
    # Two at least, of a batch spread so far that one would do: what is alive beside a tile is then the smaller.
    tiles = max(-(-n // TILE), 2 if n >= TILE // 2 else 1)
    t = -(-n // tiles)
    devices = lax.axis_size(axes)
    onward = [(i, (i + 1) % devices) for i in range(devices)]

    def cut(x: Array) -> Array:
        """[n, …] → [tiles, t, …], the last tile padded with zeros."""
        return jnp.pad(x, [(0, tiles * t - n)] + [(0, 0)] * (x.ndim - 1)).reshape(tiles, t, *x.shape[1:])

    def joined(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[:n]

    def read(tree: PyTree, i: Array) -> PyTree:
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)

    def write(tree: PyTree, tile: PyTree, i: Array) -> PyTree:
        return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0), tree, tile)

    def label(hop: Array, i: Array, j: Array) -> Array:
        row, column = (t * k + lax.broadcasted_iota(jnp.int32, (t, t), axis) for axis, k in enumerate((i, j)))
        # Texts are at home on hop 0: there equal places are positive pairs.
        sign = jnp.where((hop == 0) & (row == column), 1, -1)
        return jnp.where((row < n) & (column < n), sign, 0)

    def column(j: Array, carry: PyTree, hop: Array) -> PyTree:
        texts, text_sums, image_sums = carry
        text, text_sum = read((texts, text_sums), j)

        def row(i: Array, carry: PyTree) -> PyTree:
            image_sums, text_sum = carry
            image_sum, text_sum = visit(read(images, i), text, read(image_sums, i), text_sum, label(hop, i, j))
            return write(image_sums, image_sum, i), text_sum

        image_sums, text_sum = lax.fori_loop(0, tiles, row, (image_sums, text_sum))
        if devices > 1:
            text, text_sum = lax.ppermute((text, text_sum), axes, onward)
            texts = write(texts, text, j)
        return texts, write(text_sums, text_sum, j), image_sums

    def hop(k: Array, carry: PyTree) -> PyTree:
        return lax.fori_loop(0, tiles, partial(column, hop=k), carry)

    images, texts, image_sums, text_sums = jax.tree.map(cut, (images, texts, image_sums, text_sums))
    _, text_sums, image_sums = lax.fori_loop(0, devices, hop, (texts, text_sums, image_sums))
    return jax.tree.map(joined, (image_sums, text_sums))
