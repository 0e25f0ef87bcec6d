"""The words of a text from its image (arXiv 1511.02251; the baseline of arXiv 2103.00020 fig. 2).
Dimension letters: see `layers.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.layers import Array, normal, zeros


class BagOfWords(nn.Module):
    """`{"image": [B,S,S,3] float}` → a logit for each word [B, V], float32: a linear head on what the tower pools."""

    vision: nn.Module
    vocab_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, batch: Mapping[str, Array], *, train: bool = False, locked: Sequence[str] = ()) -> Array:
        pooled_BxE, _ = self.vision(batch["image"], train=train and "vision" not in locked)
        logits_BxV = nn.Dense(
            self.vocab_size,
            dtype=self.dtype,
            kernel_init=normal(pooled_BxE.shape[-1] ** -0.5, "embed", "vocab"),
            bias_init=zeros("vocab"),
            name="head",
        )(pooled_BxE)
        return nn.with_logical_constraint(
            logits_BxV.astype(jnp.promote_types(self.dtype, jnp.float32)), ("batch", "vocab")
        )
