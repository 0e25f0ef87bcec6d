"""GPT-2-style text tower of CLIP (arXiv 2103.00020 §2.4). Dimension letters: see `layers.py`."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import Array, Transformer, layer_norm, normal


class TextTransformer(nn.Module):
    """Token ids [B, L] → (pooled [B, E], tokens [B, L, D]).

    Attention is causal, so the first end token (`end_id`) sees the whole text: its feature, after the
    last LayerNorm, is projected to the joint space. `end_id=None` pools at the highest id, as OpenAI does.
    """

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    end_id: int | None = None
    activation: str = "quick_gelu"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text_BxL: Array, train: bool = False) -> tuple[Array, Array]:
        length, D = text_BxL.shape[-1], self.width
        if length > self.context_length:
            raise ConfigError(f"text of {length} tokens: at most context_length {self.context_length} expected")
        embedding_VxD = self.param("token_embedding", normal(0.02, "vocab", "embed"), (self.vocab_size, D))
        position_LxD = self.param("position_embedding", normal(0.01, None, "embed"), (self.context_length, D))
        x_BxLxD = embedding_VxD.astype(self.dtype)[text_BxL] + position_LxD[:length].astype(self.dtype)
        x_BxLxD = Transformer(
            self.layers, self.heads, 4 * D, self.activation,
            causal=True, remat=self.remat, dtype=self.dtype, name="transformer",
        )(x_BxLxD)  # fmt: skip
        tokens_BxLxD = layer_norm("ln_final", self.dtype)(x_BxLxD)
        end_B = jnp.argmax(text_BxL if self.end_id is None else text_BxL == self.end_id, axis=-1)
        pooled_BxD = jnp.take_along_axis(tokens_BxLxD, end_B[:, None, None], axis=1)[:, 0]
        projection_DxE = self.param("projection", normal(D**-0.5, "embed", "joint"), (D, self.embed_dim))
        return pooled_BxD @ projection_DxE.astype(self.dtype), tokens_BxLxD
