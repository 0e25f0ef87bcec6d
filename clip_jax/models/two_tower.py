"""Two towers and a temperature (arXiv 2103.00020 fig. 3)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.layers import Array


def l2_normalize(x: Array) -> Array:
    """Rows of unit length, in float32 or wider."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class TwoTower(nn.Module):
    """`{"image": [B,S,S,3] float, "text": [B,L] int32}` → (image_embedding [B,E], text_embedding [B,E], extras).

    Embeddings are L2-normalised, float32. Either input may be missing; its embedding is then None.
    `extras`: `logit_scale` (the multiplier exp(t), a scalar), `logit_bias` (a scalar, only where
    `init_logit_bias` is given, for the sigmoid loss), `image_tokens`, `text_tokens`.
    `locked` names towers that are not trained where `train` is true.
    """

    vision: nn.Module
    text: nn.Module
    init_logit_scale: float = math.log(1 / 0.07)
    init_logit_bias: float | None = None

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Array], *, train: bool = False, locked: Sequence[str] = ()
    ) -> tuple[Array | None, Array | None, dict[str, Any]]:
        t = self.param("logit_scale", nn.initializers.constant(self.init_logit_scale), ())
        extras: dict[str, Any] = {"logit_scale": jnp.exp(t)}
        if self.init_logit_bias is not None:
            extras["logit_bias"] = self.param("logit_bias", nn.initializers.constant(self.init_logit_bias), ())
        image_embedding = text_embedding = None
        if "image" in batch:
            pooled, extras["image_tokens"] = self.vision(batch["image"], train=train and "vision" not in locked)
            image_embedding = nn.with_logical_constraint(l2_normalize(pooled), ("batch", "joint"))
        if "text" in batch:
            pooled, extras["text_tokens"] = self.text(batch["text"], train=train and "text" not in locked)
            text_embedding = nn.with_logical_constraint(l2_normalize(pooled), ("batch", "joint"))
        return image_embedding, text_embedding, extras
