"""GPT-2-style text tower of CLIP (arXiv 2103.00020 §2.4), and SigLIP's (arXiv 2303.15343).
Dimension letters: see `layers.py`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import POOLED, Array, Transformer, layer_norm, look_up, normal, zeros


class TextTransformer(nn.Module):
    """Token ids [B, L] → (pooled [B, E], tokens [B, L, D]).

    `pool="end"`: attention is causal, so the first end token (`end_id`) sees the whole text: its feature, after
    the last LayerNorm, is projected to the joint space. `end_id=None` pools at the highest id, as OpenAI does.
    `pool="last"` takes the last place's feature; SigLIP has it with `causal=False`, a text of full length and a
    `projection_bias`.
    """

    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    end_id: int | None = None
    pool: str = "end"
    causal: bool = True
    projection_bias: bool = False
    mlp_width: int | None = None  # 4·width where none is given
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text_BxL: Array, train: bool = False) -> tuple[Array, Array]:
        length, D = text_BxL.shape[-1], self.width
        if length > self.context_length:
            raise ConfigError(f"text of {length} tokens: at most context_length {self.context_length} expected")
        embedding_VxD = self.param("token_embedding", normal(0.02, "vocab", "embed"), (self.vocab_size, D))
        position_LxD = self.param("position_embedding", normal(0.01, None, "embed"), (self.context_length, D))
        x_BxLxD = look_up(embedding_VxD, text_BxL, self.dtype) + position_LxD[:length].astype(self.dtype)
        x_BxLxD = Transformer(
            self.layers, self.heads, self.mlp_width or 4 * D, self.activation, causal=self.causal,
            norm_epsilon=self.norm_epsilon, remat=self.remat, dtype=self.dtype, name="transformer",
        )(x_BxLxD)  # fmt: skip
        tokens_BxLxD = layer_norm("ln_final", self.dtype, self.norm_epsilon)(x_BxLxD)
        if self.pool == "last":
            pooled_BxD = tokens_BxLxD[:, -1]
        elif self.pool == "end":
            end_B = jnp.argmax(text_BxL if self.end_id is None else text_BxL == self.end_id, axis=-1)
            pooled_BxD = jnp.take_along_axis(tokens_BxLxD, end_B[:, None, None], axis=1)[:, 0]
        else:
            raise ConfigError(f"text pool {self.pool!r}: expected end or last")
        pooled_BxD = nn.with_logical_constraint(pooled_BxD, POOLED)
        projection_DxE = self.param("projection", normal(D**-0.5, "embed", "joint"), (D, self.embed_dim))
        pooled_BxE = pooled_BxD @ projection_DxE.astype(self.dtype)
        if self.projection_bias:
            pooled_BxE += self.param("projection_bias", zeros("joint"), (self.embed_dim,)).astype(self.dtype)
        return pooled_BxE, tokens_BxLxD
