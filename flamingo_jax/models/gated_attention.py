"""The gated cross-attention block (arXiv 2204.14198 §2.2, figure 4). Dimension letters: see `layers.py`."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.models.layers import RESIDUAL, Array, attention, layer_norm, zeros
from flamingo_jax.models.layers import FeedForward, Projection

KeyValue = tuple[Array, Array]  # [B, T·R, H, K] each


class GatedCrossAttention(nn.Module):
    """x + tanh(a)·attention(norm(x) → images), then x + tanh(b)·feed-forward(norm(x)); a and b start at 0.

    `key_value` are made once for each block and document (`keys_values`), so that generation reuses them.
    A token that may attend no image gets exactly zero from the attention.
    """

    width: int
    heads: int
    head_size: int
    mlp_width: int
    media_width: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        D, H, K, C = self.width, self.heads, self.head_size, self.media_width
        axes = ("embed", "heads", "head_size")
        self.text_norm = layer_norm(None, self.dtype)
        self.media_norm = layer_norm(None, self.dtype)
        self.mlp_norm = layer_norm(None, self.dtype)
        self.query = Projection("BLD,DHK->BLHK", (D, H, K), axes, D**-0.5, self.dtype)
        self.key = Projection("BSC,CHK->BSHK", (C, H, K), axes, C**-0.5, self.dtype)
        self.value = Projection("BSC,CHK->BSHK", (C, H, K), axes, C**-0.5, self.dtype)
        self.out = Projection("BLHK,HKD->BLD", (H, K, D), ("heads", "head_size", "embed"), (H * K) ** -0.5, self.dtype)
        self.mlp = FeedForward(self.mlp_width, dtype=self.dtype)
        self.attention_gate = self.param("attention_gate", zeros(), ())
        self.mlp_gate = self.param("mlp_gate", zeros(), ())

    def keys_values(self, media_BxSxC: Array) -> KeyValue:
        media = self.media_norm(media_BxSxC)
        return self.key(media), self.value(media)

    def __call__(self, x_BxLxD: Array, media: Array | KeyValue, mask_BxLxS: Array) -> tuple[Array, None]:
        key, value = media if isinstance(media, tuple) else self.keys_values(media)
        y = attention(self.query(self.text_norm(x_BxLxD)), key, value, mask_BxLxS[:, None])
        y = jnp.where(mask_BxLxS.any(-1)[..., None, None], y, 0)
        x_BxLxD = x_BxLxD + jnp.tanh(self.attention_gate).astype(self.dtype) * self.out(y)
        x_BxLxD = nn.with_logical_constraint(x_BxLxD, RESIDUAL)
        y = self.mlp(self.mlp_norm(x_BxLxD))
        x_BxLxD = x_BxLxD + jnp.tanh(self.mlp_gate).astype(self.dtype) * y
        return nn.with_logical_constraint(x_BxLxD, RESIDUAL), None
