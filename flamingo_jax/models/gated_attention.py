"""The gated cross-attention block (arXiv 2204.14198 §2.2, figure 4), and where OpenFlamingo's (arXiv 2308.01390)
and IDEFICS's (arXiv 2306.16527) differ from it. Dimension letters: see `layers.py`.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import RESIDUAL, Array, layer_norm, zeros
from flamingo_jax.models.layers import FeedForward, Projection, RMSNorm

KeyValue = tuple[Array, Array]  # [B, H, T·R, K] each


@dataclass(frozen=True)
class GatedSpec:
    """What a gated block is; the defaults are the paper's. Raises ConfigError for an unknown gate or norm."""

    gate: str = "tanh"  # or "none": the block's outputs are added as they are (the paper's ablation)
    vector_gate: bool = False  # a gate for each of the D dimensions
    norm: str = "layer"  # or "rms"
    norm_eps: float = 1e-5
    media_norm: bool = True  # of what keys and values are made from
    qk_norm: bool = False  # of every head's queries and keys
    activation: str = "squared_relu"
    mlp_width: int = 0  # 0: 4·D

    def __post_init__(self) -> None:
        for name, allowed in {"gate": ("tanh", "none"), "norm": ("layer", "rms")}.items():
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"gated.{name} is {value!r}; expected one of {', '.join(allowed)}")


class GatedCrossAttention(nn.Module):
    """x + tanh(a)·attention(norm(x) → images), then x + tanh(b)·feed-forward(norm(x)); a and b start at 0.

    `key_value` are made once for each block and document (`keys_values`), so that generation reuses them.
    A token that may attend no image gets exactly zero from the attention.
    """

    width: int
    heads: int
    head_size: int
    media_width: int
    spec: GatedSpec = GatedSpec()
    dtype: Any = jnp.float32

    def setup(self) -> None:
        spec = self.spec
        D, H, K, C = self.width, self.heads, self.head_size, self.media_width
        axes = ("embed", "heads", "head_size")
        self.text_norm = self._norm()
        if spec.media_norm:
            self.media_norm = self._norm()
        if spec.qk_norm:
            self.query_norm, self.key_norm = self._norm(), self._norm()
        self.mlp_norm = self._norm()
        self.query = Projection("BLD,DHK->BLHK", (D, H, K), axes, D**-0.5, self.dtype)
        self.key = Projection("BSC,CHK->BSHK", (C, H, K), axes, C**-0.5, self.dtype)
        self.value = Projection("BSC,CHK->BSHK", (C, H, K), axes, C**-0.5, self.dtype)
        self.out = Projection("BLHK,HKD->BLD", (H, K, D), ("heads", "head_size", "embed"), (H * K) ** -0.5, self.dtype)
        self.mlp = FeedForward(spec.mlp_width or 4 * D, spec.activation, self.dtype)
        if spec.gate == "tanh":
            shape, names = ((D,), ("residual",)) if spec.vector_gate else ((), ())
            self.attention_gate = self.param("attention_gate", zeros(*names), shape)
            self.mlp_gate = self.param("mlp_gate", zeros(*names), shape)

    def _norm(self) -> nn.Module:
        spec = self.spec
        return RMSNorm(spec.norm_eps, self.dtype) if spec.norm == "rms" else layer_norm(None, self.dtype, spec.norm_eps)

    def keys_values(self, media_BxSxC: Array) -> KeyValue:
        media = self.media_norm(media_BxSxC) if self.spec.media_norm else media_BxSxC
        key = self.key(media)
        key = self.key_norm(key) if self.spec.qk_norm else key
        return key.swapaxes(1, 2), self.value(media).swapaxes(1, 2)

    def __call__(self, x_BxLxD: Array, media: Array | KeyValue, mask_BxLxS: Array) -> tuple[Array, None]:
        key, value = media if isinstance(media, tuple) else self.keys_values(media)
        query = self.query(self.text_norm(x_BxLxD))
        query = self.query_norm(query) if self.spec.qk_norm else query
        wide = jnp.promote_types(self.dtype, jnp.float32)
        logits = jnp.einsum("BLHK,BHSK->BHLS", query * self.head_size**-0.5, key, preferred_element_type=wide)
        logits = jnp.where(mask_BxLxS[:, None], logits, jnp.finfo(wide).min)
        y = jnp.einsum("BHLS,BHSK->BLHK", nn.softmax(logits, axis=-1).astype(self.dtype), value)
        y = self.out(jnp.where(mask_BxLxS.any(-1)[..., None, None], y, 0))
        gated = self.spec.gate == "tanh"
        x_BxLxD = x_BxLxD + (jnp.tanh(self.attention_gate).astype(self.dtype) * y if gated else y)
        x_BxLxD = nn.with_logical_constraint(x_BxLxD, RESIDUAL)
        y = self.mlp(self.mlp_norm(x_BxLxD))
        x_BxLxD = x_BxLxD + (jnp.tanh(self.mlp_gate).astype(self.dtype) * y if gated else y)
        return nn.with_logical_constraint(x_BxLxD, RESIDUAL), None
