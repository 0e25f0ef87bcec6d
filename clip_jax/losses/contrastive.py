"""CLIP's symmetric contrastive loss (arXiv 2103.00020 fig. 3), exact over a mesh, nothing N×N in memory.

Each tile of logits (see `ring.py`) is used at once for its rows and its columns, and is computed again in
the backward pass.

Logits enter as differences from the positive pair's, z_ij = scale·(cos_ij - cos_ii): the loss of a row is
then log(1 + Σ_{j≠i} exp z_ij) and the gradient of its positive logit expm1(-loss), so that neither is lost
in rounding where the pairs are nearly all matched.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from clip_jax.losses.ring import Array, dot, shard_axes, sum_over_pairs, wide


def contrastive_loss(
    image_embeddings: Array,
    text_embeddings: Array,
    logit_scale: Array,
    *,
    mesh: Mesh,
    axis_names: str | tuple[str, ...],
    label_smoothing: float = 0.0,
) -> Array:
    """Mean over both directions of the cross-entropy of `logit_scale · image · textᵀ`; row i matches row i.

    Args:
      image_embeddings: [N, D], L2-normalised, sharded over `axis_names` on the first axis. bfloat16 ones are
        multiplied in bfloat16, float32 ones in true float32; sums are float32.
      text_embeddings: [N, D], likewise.
      logit_scale: the multiplier exp(t), a scalar.
      mesh: the mesh. Over its other axes embeddings are replicated, and so is the work.
      axis_names: the mesh axes over which examples are sharded.
      label_smoothing: ε; the target is 1 - ε on the pair plus ε/N on every example, as in PyTorch.

    Returns:
      A replicated float32 (or wider) scalar. Gradients reach all three arguments.

    Raises:
      ConfigError: shapes differ, or the mesh does not divide N.
    """
    axes = shard_axes("contrastive_loss", image_embeddings, text_embeddings, mesh, axis_names)
    scale = jnp.asarray(logit_scale)
    loss = _loss(mesh, axes, image_embeddings, text_embeddings, scale)
    if not label_smoothing:
        return loss
    # Smoothing adds ε·(positive logit - mean logit) to a row's loss, and the mean of all N×N logits is that
    # of the mean image with the mean text.
    image_NxD, text_NxD = wide(image_embeddings), wide(text_embeddings)
    positive = jnp.mean(jnp.sum(image_NxD * text_NxD, axis=-1))
    mean = jnp.sum(image_NxD.mean(axis=0) * text_NxD.mean(axis=0))
    return loss + label_smoothing * wide(scale) * (positive - mean)


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
    positive_n = jnp.sum(wide(image_nxD) * wide(text_nxD), axis=-1)
    zero_n = jnp.zeros_like(positive_n)
    scale = wide(scale)

    def visit(images, texts, row_state, column_state, label_rxc):
        (image_rxD, positive_r), (text_cxD, positive_c) = images, texts
        cosine_rxc = dot("rD,cD->rc", image_rxD, text_cxD)
        z_row = jnp.where(label_rxc < 0, scale * (cosine_rxc - positive_r[:, None]), -jnp.inf)
        z_column = jnp.where(label_rxc < 0, scale * (cosine_rxc - positive_c[None, :]), -jnp.inf)
        return _add_exponentials(row_state, z_row, 1), _add_exponentials(column_state, z_column, 0)

    states = sum_over_pairs(
        visit, (image_nxD, positive_n), (text_nxD, positive_n), (zero_n, zero_n), (zero_n, zero_n), axes
    )
    row_loss_n, column_loss_n = map(_log_1p_sum, states)
    total = lax.psum(jnp.sum(row_loss_n) + jnp.sum(column_loss_n), axes)
    return total / (2 * len(zero_n) * lax.axis_size(axes)), row_loss_n, column_loss_n


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
    positive_n = jnp.sum(wide(image_nxD) * wide(text_nxD), axis=-1)
    wide_scale = wide(scale)
    weight = wide(cotangent) / (2 * len(positive_n) * lax.axis_size(axes))

    def visit(images, texts, image_sums, text_gradient_cxD, label_rxc):
        image_rxD, positive_r, row_loss_r = images
        text_cxD, positive_c, column_loss_c = texts
        image_gradient_rxD, scale_gradient_r = image_sums
        cosine_rxc = dot("rD,cD->rc", image_rxD, text_cxD)
        from_row, from_column = cosine_rxc - positive_r[:, None], cosine_rxc - positive_c[None, :]
        p_rxc = jnp.where(label_rxc < 0, jnp.exp(wide_scale * from_row - row_loss_r[:, None]), 0)
        q_rxc = jnp.where(label_rxc < 0, jnp.exp(wide_scale * from_column - column_loss_c[None, :]), 0)
        pull_rxc = weight * wide_scale * (p_rxc + q_rxc)
        image_gradient_rxD += dot("rc,cD->rD", pull_rxc, text_cxD)
        text_gradient_cxD += dot("rc,rD->cD", pull_rxc, image_rxD)
        scale_gradient_r += weight * jnp.sum(p_rxc * from_row + q_rxc * from_column, axis=1)
        return (image_gradient_rxD, scale_gradient_r), text_gradient_cxD

    # The sums start with the positive pairs' own share.
    own_nx1 = (weight * wide_scale * (jnp.expm1(-row_loss_n) + jnp.expm1(-column_loss_n)))[:, None]
    (image_gradient_nxD, scale_gradient_n), text_gradient_nxD = sum_over_pairs(
        visit,
        (image_nxD, positive_n, row_loss_n),
        (text_nxD, positive_n, column_loss_n),
        (own_nx1 * wide(text_nxD), jnp.zeros_like(positive_n)),
        own_nx1 * wide(image_nxD),
        axes,
    )
    scale_gradient = lax.psum(jnp.sum(scale_gradient_n), axes)
    return (
        image_gradient_nxD.astype(image_nxD.dtype),
        text_gradient_nxD.astype(text_nxD.dtype),
        scale_gradient.astype(scale.dtype),
    )
