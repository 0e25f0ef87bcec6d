"""An image's caption, token by token: VirTex's head (arXiv 2006.06666 §3) without its second direction, on the
image tower of CLIP (the baseline of arXiv 2103.00020 §2.3 and fig. 2).
Dimension letters: see `layers.py`; G captions: G/B for each image, those of an image in a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import (
    REMAT_POLICIES,
    RESIDUAL,
    Array,
    Attention,
    FeedForward,
    attention,
    layer_norm,
    look_up,
    merge_heads,
    normal,
    split_heads,
    zeros,
)


class CrossAttention(nn.Module):
    """Every token of an image's captions attends to all of the image's tokens."""

    heads: int
    out_std: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_GxLxD: Array, image_BxNxD: Array) -> Array:
        B, _, D = image_BxNxD.shape
        query, key, value = (split_heads(D, self.heads, name, self.dtype) for name in ("query", "key", "value"))
        # The order of text tokens doesn't matter here: an image's captions are one long query.
        y_BxQxHxK = attention(query(x_GxLxD.reshape(B, -1, D)), key(image_BxNxD), value(image_BxNxD))
        out = merge_heads(self.heads, D // self.heads, D, "embed", self.out_std, self.dtype)
        return out(y_BxQxHxK).reshape(x_GxLxD.shape)


class CaptionBlock(nn.Module):
    """x + causal attention(LN(x)), then x + cross-attention(LN(x)), then x + feed-forward(LN(x))."""

    heads: int
    mlp_width: int
    activation: str
    out_std: float
    norm_epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_GxLxD: Array, image_BxNxD: Array) -> tuple[Array, None]:
        y = layer_norm("attention_norm", self.dtype, self.norm_epsilon)(x_GxLxD)
        y = Attention(self.heads, self.out_std, causal=True, dtype=self.dtype, name="attention")(y)
        x_GxLxD = nn.with_logical_constraint(x_GxLxD + y, RESIDUAL)
        y = layer_norm("cross_attention_norm", self.dtype, self.norm_epsilon)(x_GxLxD)
        y = CrossAttention(self.heads, self.out_std, self.dtype, name="cross_attention")(y, image_BxNxD)
        x_GxLxD = nn.with_logical_constraint(x_GxLxD + y, RESIDUAL)
        y = layer_norm("mlp_norm", self.dtype, self.norm_epsilon)(x_GxLxD)
        y = FeedForward(self.mlp_width, self.activation, self.out_std, self.dtype, name="mlp")(y)
        return nn.with_logical_constraint(x_GxLxD + y, RESIDUAL), None


class Captioner(nn.Module):
    """`{"image": [B,S,S,3] float, "text": [G,L] int32}` → (logits [G, L, V] float32, image tokens [B, N, D]).

    The logits at a token are those of the next one. Without "text" there are none (None); "image_tokens" from an
    earlier call may stand in the place of "image". The output projection is the token embedding. What the tower
    pools is not looked at.
    """

    vision: nn.Module
    vocab_size: int
    context_length: int
    width: int
    layers: int
    heads: int
    mlp_width: int | None = None  # 4·width where none is given
    activation: str = "quick_gelu"
    norm_epsilon: float = 1e-5
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, batch: Mapping[str, Array], *, train: bool = False, locked: Sequence[str] = ()
    ) -> tuple[Array | None, Array]:
        D = self.width
        if "image_tokens" in batch:
            image_BxNxD = batch["image_tokens"]
        else:
            _, tokens_BxNxC = self.vision(batch["image"], train=train and "vision" not in locked)
            image_BxNxD = nn.Dense(
                D,
                dtype=self.dtype,
                kernel_init=normal(tokens_BxNxC.shape[-1] ** -0.5, "embed", "residual"),
                bias_init=zeros("residual"),
                name="image_projection",
            )(tokens_BxNxC)
            image_BxNxD = layer_norm("image_norm", self.dtype, self.norm_epsilon)(image_BxNxD)
            image_BxNxD = nn.with_logical_constraint(image_BxNxD, RESIDUAL)
        if "text" not in batch:
            return None, image_BxNxD
        text_GxL = batch["text"]
        length = text_GxL.shape[-1]
        if length > self.context_length:
            raise ConfigError(f"text of {length} tokens: at most context_length {self.context_length} expected")
        embedding_VxD = self.param("token_embedding", normal(0.02, "vocab", "embed"), (self.vocab_size, D))
        position_LxD = self.param("position_embedding", normal(0.01, None, "embed"), (self.context_length, D))
        x_GxLxD = look_up(embedding_VxD, text_GxL, self.dtype) + position_LxD[:length].astype(self.dtype)

        block: Any = CaptionBlock
        if self.remat != "none":
            block = nn.remat(CaptionBlock, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            self.heads, self.mlp_width or 4 * D, self.activation, D**-0.5 * (3 * self.layers) ** -0.5,
            self.norm_epsilon, self.dtype, name="blocks",
        )  # fmt: skip
        x_GxLxD, _ = blocks(nn.with_logical_constraint(x_GxLxD, RESIDUAL), image_BxNxD)
        x_GxLxD = layer_norm("ln_final", self.dtype, self.norm_epsilon)(x_GxLxD)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        logits_GxLxV = jnp.einsum("GLD,VD->GLV", x_GxLxD, embedding_VxD.astype(self.dtype), preferred_element_type=wide)
        return logits_GxLxV, image_BxNxD
