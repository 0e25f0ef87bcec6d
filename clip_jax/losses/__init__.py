"""Losses over a mesh: sharded embeddings in, one exact global scalar out."""

from clip_jax.losses.contrastive import contrastive_loss
from clip_jax.losses.sigmoid import sigmoid_loss

__all__ = ["contrastive_loss", "sigmoid_loss"]
