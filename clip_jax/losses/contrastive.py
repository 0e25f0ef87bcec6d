"""CLIP's symmetric contrastive loss (arXiv 2103.00020 fig. 3), exact over a mesh, nothing N×N in memory.

Every device keeps its own images; the texts travel round the ring of devices, and with them what is
being summed for their columns. Each tile of logits is used at once for its rows and its columns, and is
computed again in the backward pass.

Logits enter as differences from the positive pair's, z_ij = scale·(cos_ij - cos_ii): the loss of a row is
then log(1 + Σ_{j≠i} exp z_ij) and the gradient of its positive logit expm1(-loss), so that neither is lost
in rounding where the pairs are nearly all matched.

N examples, n of them on each device, D width, t tile side (r of rows, c of columns).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from clip_jax.errors import ConfigError

Array = jax.Array

TILE = 512  # rows and columns of a tile of logits: 1 MiB in float32


class Side(NamedTuple):
    """One side's embeddings on a device, cut in tiles, and what belongs to each of them."""

    embedding: Array  # [n/t, t, D]
    positive: Array  # [n/t, t] cosine of the positive pair
    place: Array  # [n/t, t] int32 position on the device; -1 where a tile is padded


def contrastive_loss(
    image_embeddings: Array,
    text_embeddings: Array,
    logit_scale: Array,
    *,
    mesh: Mesh,
    axis_names: str | tuple[str, ...],
) -> Array:
    """Mean over both directions of the cross-entropy of `logit_scale · image · textᵀ`; row i matches row i.

    Args:
      image_embeddings: [N, D], L2-normalised, sharded over `axis_names` on the first axis.
      text_embeddings: [N, D], likewise.
      logit_scale: the multiplier exp(t), a scalar.
      mesh: the mesh; its other axes see replicated values.
      axis_names: the mesh axes over which examples are sharded.

    Returns:
      A replicated float32 (or wider) scalar. Gradients reach all three arguments.

    Raises:
      ConfigError: shapes differ, or the mesh does not divide N.
    """
    axes = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)
    if image_embeddings.shape != text_embeddings.shape or image_embeddings.ndim != 2:
        raise ConfigError(
            f"contrastive_loss: image embeddings {image_embeddings.shape} and text embeddings "
            f"{text_embeddings.shape}: expected the same [N, D]"
        )
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if image_embeddings.shape[0] % shards:
        raise ConfigError(
            f"contrastive_loss: {image_embeddings.shape[0]} examples are not divisible by the {shards} "
            f"shards of mesh axes {', '.join(axes)}"
        )
    return _loss(mesh, axes, image_embeddings, text_embeddings, jnp.asarray(logit_scale))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(mesh: Mesh, axes: tuple[str, ...], image_NxD: Array, text_NxD: Array, scale: Array) -> Array:
    return _forward(mesh, axes, image_NxD, text_NxD, scale)[0]


# The custom VJP stands around the shard_map: inside one it would get its cotangent divided by the devices.
def _forward(mesh: Mesh, axes: tuple[str, ...], image_NxD: Array, text_NxD: Array, scale: Array):
    rows, one = PartitionSpec(axes), PartitionSpec()
    loss, row_loss_N, column_loss_N = jax.shard_map(
        partial(_local_losses, axes=axes),
        mesh=mesh,
        in_specs=(rows, rows, one),
        out_specs=(one, rows, rows),
    )(image_NxD, text_NxD, scale)
    return loss, (image_NxD, text_NxD, scale, row_loss_N, column_loss_N)


def _backward(mesh: Mesh, axes: tuple[str, ...], residuals: tuple[Array, ...], cotangent: Array):
    rows, one = PartitionSpec(axes), PartitionSpec()
    image_NxD, text_NxD, scale, row_loss_N, column_loss_N = residuals
    return jax.shard_map(
        partial(_local_gradients, axes=axes),
        mesh=mesh,
        in_specs=(rows, rows, one, rows, rows, one),
        out_specs=(rows, rows, one),
    )(image_NxD, text_NxD, scale, row_loss_N, column_loss_N, cotangent)


_loss.defvjp(_forward, _backward)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _dot(spec: str, a: Array, b: Array) -> Array:
    """float32 products are true float32 ones: a TPU's default would round the factors to bfloat16."""
    return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST, preferred_element_type=_wide(a).dtype)


def _tiles(x: Array) -> Array:
    """[n, …] → [tiles, t, …], the last tile padded with zeros."""
    n = x.shape[0]
    t = min(n, TILE)
    x = jnp.pad(x, [(0, -n % t)] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(-1, t, *x.shape[1:])


def _sides(image_nxD: Array, text_nxD: Array, axes: tuple[str, ...]) -> tuple[Side, Side]:
    n = image_nxD.shape[0]
    positive = _tiles(jnp.sum(_wide(image_nxD) * _wide(text_nxD), axis=-1))
    place = lax.pcast(_tiles(jnp.arange(1, n + 1, dtype=jnp.int32)) - 1, axes, to="varying")
    return Side(_tiles(image_nxD), positive, place), Side(_tiles(text_nxD), positive, place)


def _negatives(image: Side, text: Side, home: Array) -> tuple[Array, Array]:
    """Cosines [r, c] of a tile, and which of them are negative pairs (neither positive nor padding).

    `home` tells that the texts are this device's own, so that equal positions are the positive pairs.
    """
    cosine_rxc = _dot("rD,cD->rc", image.embedding, text.embedding)
    real = (image.place[:, None] >= 0) & (text.place[None, :] >= 0)
    return cosine_rxc, real & ~(home & (image.place[:, None] == text.place[None, :]))


def _ring(step, travelling, staying, axes: tuple[str, ...]):
    """Runs `step(travelling, staying, k)` once for each device's texts; after the last they are home again."""
    devices = lax.axis_size(axes)
    if devices == 1:
        return step(travelling, staying, jnp.int32(0))
    onward = [(i, (i + 1) % devices) for i in range(devices)]

    def hop(carry, k):
        travelling, staying = step(*carry, k)
        return (lax.ppermute(travelling, axes, onward), staying), None

    return lax.scan(hop, (travelling, staying), jnp.arange(devices, dtype=jnp.int32))[0]


def _add_exponentials(state: tuple[Array, Array], z: Array, axis: int) -> tuple[Array, Array]:
    """Adds exp(z), summed over `axis`, to a sum kept as (m, s) for s·exp(m), m ≥ 0 growing as needed."""
    m, s = state
    m_new = jnp.maximum(m, z.max(axis=axis))
    return m_new, s * jnp.exp(m - m_new) + jnp.exp(z - jnp.expand_dims(m_new, axis)).sum(axis=axis)


def _log_1p_sum(state: tuple[Array, Array]) -> Array:
    """log(1 + s·exp(m)), exact for small sums too."""
    m, s = state
    return m + jnp.log1p(s + jnp.expm1(-m))


def _local_losses(image_nxD: Array, text_nxD: Array, scale: Array, *, axes: tuple[str, ...]):
    """This device's part: (global loss, row losses [n], column losses [n])."""
    n = image_nxD.shape[0]
    images, texts = _sides(image_nxD, text_nxD, axes)
    scale = _wide(scale)
    zero = jnp.zeros_like(images.positive)
    nothing = (zero, zero)  # (m, s) of an empty sum, for every row

    def step(travelling, row_state, k):
        texts, column_state = travelling

        def column_tile(row_state, inputs):
            text, column_state = inputs

            def row_tile(column_state, inputs):
                image, row_state = inputs
                cosine, negative = _negatives(image, text, k == 0)
                z_row = jnp.where(negative, scale * (cosine - image.positive[:, None]), -jnp.inf)
                z_column = jnp.where(negative, scale * (cosine - text.positive[None, :]), -jnp.inf)
                row_state = _add_exponentials(row_state, z_row, 1)
                return _add_exponentials(column_state, z_column, 0), row_state

            column_state, row_state = lax.scan(row_tile, column_state, (images, row_state))
            return row_state, column_state

        row_state, column_state = lax.scan(column_tile, row_state, (texts, column_state))
        return (texts, column_state), row_state

    (_, column_state), row_state = _ring(step, (texts, nothing), nothing, axes)
    row_loss_n, column_loss_n = (_log_1p_sum(s).reshape(-1)[:n] for s in (row_state, column_state))
    total = lax.psum(jnp.sum(row_loss_n) + jnp.sum(column_loss_n), axes)
    return total / (2 * n * lax.axis_size(axes)), row_loss_n, column_loss_n


def _local_gradients(
    image_nxD: Array,
    text_nxD: Array,
    scale: Array,
    row_loss_n: Array,
    column_loss_n: Array,
    cotangent: Array,
    *,
    axes: tuple[str, ...],
):
    """This device's part of the gradients of images [n, D], texts [n, D] and scale (summed over devices)."""
    n = image_nxD.shape[0]
    images, texts = _sides(image_nxD, text_nxD, axes)
    wide_scale = _wide(scale)
    weight = _wide(cotangent) / (2 * n * lax.axis_size(axes))
    # The positive pairs' own share; the ring adds the negatives'.
    positive = (jnp.expm1(-row_loss_n) + jnp.expm1(-column_loss_n))[:, None]
    image_gradient = _tiles(positive * _wide(text_nxD))
    text_gradient = _tiles(positive * _wide(image_nxD))
    scale_gradient = lax.pcast(jnp.zeros((), wide_scale.dtype), axes, to="varying")

    def step(travelling, staying, k):
        texts, column_losses, text_gradients = travelling

        def column_tile(staying, inputs):
            text, column_loss, text_gradient = inputs

            def row_tile(carry, inputs):
                text_gradient, scale_gradient = carry
                image, row_loss, image_gradient = inputs
                cosine, negative = _negatives(image, text, k == 0)
                from_row = cosine - image.positive[:, None]
                from_column = cosine - text.positive[None, :]
                p = jnp.where(negative, jnp.exp(wide_scale * from_row - row_loss[:, None]), 0)
                q = jnp.where(negative, jnp.exp(wide_scale * from_column - column_loss[None, :]), 0)
                pull = (p + q).astype(text.embedding.dtype)
                image_gradient += _dot("rc,cD->rD", pull, text.embedding)
                text_gradient += _dot("rc,rD->cD", pull, image.embedding)
                scale_gradient += jnp.sum(p * from_row + q * from_column)
                return (text_gradient, scale_gradient), image_gradient

            image_gradients, scale_gradient = staying
            (text_gradient, scale_gradient), image_gradients = lax.scan(
                row_tile, (text_gradient, scale_gradient), (images, row_losses, image_gradients)
            )
            return (image_gradients, scale_gradient), text_gradient

        staying, text_gradients = lax.scan(column_tile, staying, (texts, column_losses, text_gradients))
        return (texts, column_losses, text_gradients), staying

    row_losses = _tiles(row_loss_n)
    travelling = (texts, _tiles(column_loss_n), text_gradient)
    travelling, (image_gradient, scale_gradient) = _ring(step, travelling, (image_gradient, scale_gradient), axes)

    def finish(gradient: Array, like: Array) -> Array:
        gradient_nxD = gradient.reshape(-1, gradient.shape[-1])[:n]
        return (weight * wide_scale * gradient_nxD).astype(like.dtype)

    scale_gradient = lax.psum(weight * scale_gradient, axes).astype(scale.dtype)
    return finish(image_gradient, image_nxD), finish(travelling[2], text_nxD), scale_gradient
