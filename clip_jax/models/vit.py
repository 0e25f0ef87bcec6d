"""Vision transformer as CLIP has it (arXiv 2103.00020 §2.4) and as SigLIP has it (arXiv 2303.15343).
Dimension letters: see `layers.py`; P patch size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import (
    POOLED,
    RESIDUAL,
    Array,
    FeedForward,
    Transformer,
    attention,
    layer_norm,
    merge_heads,
    normal,
    split_heads,
    zeros,
)


def drop_patches(x_BxNxD: Array, rate: float, rng: Array) -> Array:
    """Of each example keeps max(1, ⌊N·(1 - rate)⌋) tokens drawn without replacement (arXiv 2212.00794)."""
    batch, tokens, _ = x_BxNxD.shape
    kept = max(1, int(tokens * (1 - rate)))
    _, index_BxN = jax.lax.top_k(jax.random.uniform(rng, (batch, tokens)), kept)
    return jnp.take_along_axis(x_BxNxD, jnp.sort(index_BxN)[:, :, None], axis=1)


class AttentionHead(nn.Module):
    """Multi-head attention pooling (arXiv 2106.04560 §2): a learned probe attends to the tokens, then an MLP."""

    heads: int
    mlp_width: int
    activation: str
    norm_epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens_BxNxD: Array) -> Array:
        batch, _, D = tokens_BxNxD.shape
        probe_D = self.param("probe", normal(D**-0.5, "residual"), (D,))
        query, key, value = (split_heads(D, self.heads, n, self.dtype) for n in ("query", "key", "value"))
        query_Bx1xHxK = jnp.broadcast_to(query(probe_D[None, None]), (batch, 1, self.heads, D // self.heads))
        y_Bx1xHxK = attention(query_Bx1xHxK, key(tokens_BxNxD), value(tokens_BxNxD))
        x_Bx1xD = merge_heads(self.heads, D // self.heads, D, "embed", D**-0.5, self.dtype)(y_Bx1xHxK)
        x_Bx1xD = nn.with_logical_constraint(x_Bx1xD, RESIDUAL)
        y_Bx1xD = layer_norm("mlp_norm", self.dtype, self.norm_epsilon)(x_Bx1xD)
        y_Bx1xD = FeedForward(self.mlp_width, self.activation, D**-0.5, self.dtype, name="mlp")(y_Bx1xD)
        return (x_Bx1xD + y_Bx1xD)[:, 0]


class VisionTransformer(nn.Module):
    """Pixels [B, S, S, 3] → (pooled [B, E], tokens [B, N, D]).

    `pool="class"` is CLIP's: a class token, `ln_pre`, no bias in the patch embedding; pooled is the class token,
    through `ln_post` and a projection (none where `embed_dim` is 0: a tower by itself). `pool="map"` is SigLIP's:
    a bias in the patch embedding; pooled is what an `AttentionHead` makes of all tokens, through `ln_post`, without
    a projection (E = D).

    `tokens` are the last block's output before `ln_post`, the class token first (`num_prefix_tokens`);
    this is what Flamingo's replicas look at. With `norm_tokens` they are taken after `ln_post`.
    Pixels that do not fill a patch are cut off, right and below.
    `patch_dropout` is the share of patches left out in training; it draws from the rng `dropout`.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    pool: str = "class"
    mlp_width: int | None = None  # 4·width where none is given
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5
    norm_tokens: bool = False
    patch_dropout: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32

    @property
    def num_prefix_tokens(self) -> int:
        return 1 if self.pool == "class" else 0

    @nn.compact
    def __call__(self, image_BxSxSx3: Array, train: bool = False) -> tuple[Array, Array]:
        batch, height, width, _ = image_BxSxSx3.shape
        patch, D, mlp_width = self.patch_size, self.width, self.mlp_width or 4 * self.width
        if self.pool not in ("class", "map"):
            raise ConfigError(f"vision pool {self.pool!r}: expected class or map")
        if (height, width) != (self.image_size, self.image_size):
            raise ConfigError(f"image of {height}×{width} pixels: expected {self.image_size}×{self.image_size}")
        if self.pool == "map" and self.embed_dim != D:
            raise ConfigError(f"vision pool map has no projection: embed_dim {self.embed_dim} must be the width {D}")
        has_class = self.pool == "class"
        grid = self.image_size // patch
        # A convolution whose stride is its kernel is one matrix product over cut-out patches.
        whole = image_BxSxSx3[:, : grid * patch, : grid * patch]
        patches = whole.reshape(batch, grid, patch, grid, patch, 3).astype(self.dtype)
        kernel = self.param("patch_embedding", normal((3 * patch**2) ** -0.5, None, None, None, "embed"),
                            (patch, patch, 3, D))  # fmt: skip
        x_BxNxD = jnp.einsum("BhPwQC,PQCD->BhwD", patches, kernel.astype(self.dtype)).reshape(batch, grid**2, D)
        if not has_class:
            x_BxNxD += self.param("patch_bias", zeros("residual"), (D,)).astype(self.dtype)

        places = grid**2 + self.num_prefix_tokens
        position_NxD = self.param("position_embedding", normal(D**-0.5, None, "embed"), (places, D)).astype(self.dtype)
        x_BxNxD += position_NxD[self.num_prefix_tokens :]
        if train and self.patch_dropout > 0:
            x_BxNxD = drop_patches(x_BxNxD, self.patch_dropout, self.make_rng("dropout"))
        if has_class:
            class_D = self.param("class_embedding", normal(D**-0.5, "residual"), (D,))
            class_Bx1xD = jnp.broadcast_to(class_D.astype(self.dtype) + position_NxD[0], (batch, 1, D))
            x_BxNxD = jnp.concatenate([class_Bx1xD, x_BxNxD], axis=1)
            x_BxNxD = layer_norm("ln_pre", self.dtype, self.norm_epsilon)(x_BxNxD)

        tokens_BxNxD = Transformer(
            self.layers, self.heads, mlp_width, self.activation,
            norm_epsilon=self.norm_epsilon, remat=self.remat, dtype=self.dtype, name="transformer",
        )(x_BxNxD)  # fmt: skip
        ln_post = layer_norm("ln_post", self.dtype, self.norm_epsilon)
        if has_class:
            pooled = nn.with_logical_constraint(ln_post(tokens_BxNxD[:, 0]), POOLED)
            if self.embed_dim:
                projection_DxE = self.param("projection", normal(D**-0.5, "embed", "joint"), (D, self.embed_dim))
                pooled = pooled @ projection_DxE.astype(self.dtype)
            return pooled, ln_post(tokens_BxNxD) if self.norm_tokens else tokens_BxNxD
        head = AttentionHead(self.heads, mlp_width, self.activation, self.norm_epsilon, self.dtype, name="head")
        normed_BxNxD = ln_post(tokens_BxNxD)
        return head(normed_BxNxD), normed_BxNxD if self.norm_tokens else tokens_BxNxD
