"""BERT (arXiv 1810.04805) as the text tower of Flamingo's contrastive pair (arXiv 2204.14198, appendix B).
Dimension letters: see `layers.py`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import POOLED, Array, Transformer, layer_norm, look_up, normal


class Bert(nn.Module):
    """Token ids [B, L] → (pooled [B, E], tokens [B, L, D]).

    Every token sees all that are no padding (`pad_id`); `pooled` is the mean of those, projected. The table of
    positions may be longer than a text (`context_length`), so that published weights fit. Texts are single segments:
    all tokens are of type 0 unless `type_BxL` says otherwise. There is no dropout.
    """

    vocab_size: int
    context_length: int
    positions: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    pad_id: int
    types: int = 2
    mlp_width: int | None = None  # 4·width where none is given
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, text_BxL: Array, train: bool = False, type_BxL: Array | None = None) -> tuple[Array, Array]:
        length, D = text_BxL.shape[-1], self.width
        if length > self.positions:
            raise ConfigError(f"text of {length} tokens: at most {self.positions} positions expected")

        def table(name: str, axis: str | None, rows: int) -> Array:
            return self.param(name, normal(0.02, axis, "embed"), (rows, D)).astype(self.dtype)

        embedding_VxD = table("token_embedding", "vocab", self.vocab_size)

        type_D_or_BxLxD = table("type_embedding", None, self.types)[0 if type_BxL is None else type_BxL]
        x_BxLxD = look_up(embedding_VxD, text_BxL, self.dtype) + type_D_or_BxLxD
        x_BxLxD += table("position_embedding", None, self.positions)[:length]
        x_BxLxD = layer_norm("embedding_norm", self.dtype, self.norm_epsilon)(x_BxLxD)
        real_BxL = text_BxL != self.pad_id
        tokens_BxLxD = Transformer(
            self.layers, self.heads, self.mlp_width or 4 * D, self.activation, norm_epsilon=self.norm_epsilon,
            post_norm=True, remat=self.remat, dtype=self.dtype, name="transformer",
        )(x_BxLxD, real_BxL[:, None, None, :])  # fmt: skip
        wide = tokens_BxLxD.astype(jnp.promote_types(self.dtype, jnp.float32))
        total_BxD = jnp.einsum("BLD,BL->BD", wide, real_BxL.astype(wide.dtype))
        pooled_BxD = total_BxD / jnp.maximum(real_BxL.sum(axis=1, keepdims=True), 1)
        projection_DxE = self.param("projection", normal(D**-0.5, "embed", "joint"), (D, self.embed_dim))
        pooled_BxD = nn.with_logical_constraint(pooled_BxD.astype(self.dtype), POOLED)
        return pooled_BxD @ projection_DxE.astype(self.dtype), tokens_BxLxD
