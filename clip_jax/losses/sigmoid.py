"""SigLIP's sigmoid loss (arXiv 2303.15343 §3.2), exact over a mesh, nothing N×N in memory.

A pair's loss needs no other pair, so that one pass over the tiles (see `ring.py`) gives the loss and its
gradients: where these are wanted, no logit is computed twice.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from clip_jax.losses.ring import Array, dot, shard_axes, sum_over_pairs, wide


def sigmoid_loss(
    image_embeddings: Array,
    text_embeddings: Array,
    logit_scale: Array,
    logit_bias: Array,
    *,
    mesh: Mesh,
    axis_names: str | tuple[str, ...],
) -> Array:
    """-Σ_ij log σ(z_ij·(logit_scale · image_i · text_j + logit_bias)) / N, with z_ij = 1 for i = j, else -1.

    Args:
      image_embeddings: [N, D], L2-normalised, sharded over `axis_names` on the first axis. bfloat16 ones are
        multiplied in bfloat16, float32 ones in true float32; sums are float32.
      text_embeddings: [N, D], likewise.
      logit_scale: the multiplier exp(t), a scalar.
      logit_bias: a scalar.
      mesh: the mesh. Over its other axes embeddings are replicated, and so is the work.
      axis_names: the mesh axes over which examples are sharded.

    Returns:
      A replicated float32 (or wider) scalar. Gradients reach all four arguments.

    Raises:
      ConfigError: shapes differ, or the mesh does not divide N.
    """
    axes = shard_axes("sigmoid_loss", image_embeddings, text_embeddings, mesh, axis_names)
    return _loss(mesh, axes, image_embeddings, text_embeddings, jnp.asarray(logit_scale), jnp.asarray(logit_bias))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(mesh: Mesh, axes: tuple[str, ...], image_NxD: Array, text_NxD: Array, scale: Array, bias: Array) -> Array:
    return _forward(mesh, axes, image_NxD, text_NxD, scale, bias)[0]  # the compiler drops the unused gradients


def _forward(mesh: Mesh, axes: tuple[str, ...], *inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    rows, one = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        partial(_local, axes=axes),
        mesh=mesh,
        in_specs=(rows, rows, one, one),
        out_specs=(one, (rows, rows, one, one)),
    )(*inputs)


def _backward(mesh: Mesh, axes: tuple[str, ...], gradients: tuple[Array, ...], cotangent: Array) -> tuple[Array, ...]:
    return tuple((cotangent * gradient).astype(gradient.dtype) for gradient in gradients)


_loss.defvjp(_forward, _backward)


def _local(image_nxD: Array, text_nxD: Array, scale: Array, bias: Array, *, axes: tuple[str, ...]):
    """(global loss, gradients of images [n, D] and texts [n, D] of this device, of scale and of bias)."""
    wide_scale, wide_bias = wide(scale), wide(bias)
    zero_n = jnp.zeros_like(image_nxD[:, 0], wide(image_nxD).dtype)
    weight = 1 / (len(zero_n) * lax.axis_size(axes))

    def visit(image_rxD, text_cxD, image_sums, text_gradient_cxD, label_rxc):
        image_gradient_rxD, loss_r, scale_gradient_r, bias_gradient_r = image_sums
        cosine_rxc = dot("rD,cD->rc", image_rxD, text_cxD)
        logit_rxc = wide_scale * cosine_rxc + wide_bias
        loss_rxc = jnp.where(label_rxc == 0, 0, jax.nn.softplus(-label_rxc * logit_rxc))
        pull_rxc = weight * label_rxc * jnp.expm1(-loss_rxc)  # of a logit: -label·σ(-label·logit)
        scaled_rxc = wide_scale * pull_rxc
        image_gradient_rxD += dot("rc,cD->rD", scaled_rxc, text_cxD)
        text_gradient_cxD += dot("rc,rD->cD", scaled_rxc, image_rxD)
        loss_r += jnp.sum(loss_rxc, axis=1)
        scale_gradient_r += jnp.sum(pull_rxc * cosine_rxc, axis=1)
        bias_gradient_r += jnp.sum(pull_rxc, axis=1)
        return (image_gradient_rxD, loss_r, scale_gradient_r, bias_gradient_r), text_gradient_cxD

    (image_gradient_nxD, *sums_n), text_gradient_nxD = sum_over_pairs(
        visit,
        image_nxD,
        text_nxD,
        (jnp.zeros_like(image_nxD, zero_n.dtype), zero_n, zero_n, zero_n),
        jnp.zeros_like(text_nxD, zero_n.dtype),
        axes,
    )
    loss, scale_gradient, bias_gradient = (lax.psum(jnp.sum(x), axes) for x in sums_n)
    return weight * loss, (
        image_gradient_nxD.astype(image_nxD.dtype),
        text_gradient_nxD.astype(text_nxD.dtype),
        scale_gradient.astype(scale.dtype),
        bias_gradient.astype(bias.dtype),
    )
