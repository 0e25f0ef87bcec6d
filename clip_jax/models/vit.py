"""Vision transformer as CLIP has it (arXiv 2103.00020 §2.4): class token, `ln_pre`, `ln_post`, no biases
in the patch embedding and the projection. Dimension letters: see `layers.py`; P patch size.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import Array, Transformer, layer_norm, normal


class VisionTransformer(nn.Module):
    """Pixels [B, S, S, 3] → (pooled [B, E], tokens [B, 1 + N, D]).

    `tokens` are the last block's output before `ln_post`, the class token first (`num_prefix_tokens`);
    this is what Flamingo's replicas look at.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    embed_dim: int
    mlp_ratio: float = 4.0
    activation: str = "quick_gelu"
    remat: str = "none"
    dtype: Any = jnp.float32

    num_prefix_tokens = 1

    @nn.compact
    def __call__(self, image_BxSxSx3: Array, train: bool = False) -> tuple[Array, Array]:
        batch, height, width, _ = image_BxSxSx3.shape
        patch, D = self.patch_size, self.width
        if (height, width) != (self.image_size, self.image_size) or self.image_size % patch:
            raise ConfigError(
                f"image of {height}×{width} pixels: expected {self.image_size}×{self.image_size}, "
                f"a multiple of the patch size {patch}"
            )
        grid = self.image_size // patch
        # A convolution whose stride is its kernel is one matrix product over cut-out patches.
        patches = image_BxSxSx3.reshape(batch, grid, patch, grid, patch, 3).astype(self.dtype)
        kernel = self.param("patch_embedding", normal((3 * patch**2) ** -0.5, None, None, None, "embed"),
                            (patch, patch, 3, D))  # fmt: skip
        x_BxNxD = jnp.einsum("BhPwQC,PQCD->BhwD", patches, kernel.astype(self.dtype)).reshape(batch, grid**2, D)

        class_D = self.param("class_embedding", normal(D**-0.5, "residual"), (D,))
        position_NxD = self.param("position_embedding", normal(D**-0.5, None, "embed"), (grid**2 + 1, D))
        class_Bx1xD = jnp.broadcast_to(class_D.astype(self.dtype), (batch, 1, D))
        x_BxNxD = jnp.concatenate([class_Bx1xD, x_BxNxD], axis=1) + position_NxD.astype(self.dtype)

        x_BxNxD = layer_norm("ln_pre", self.dtype)(x_BxNxD)
        tokens_BxNxD = Transformer(
            self.layers, self.heads, int(D * self.mlp_ratio), self.activation,
            remat=self.remat, dtype=self.dtype, name="transformer",
        )(x_BxNxD)  # fmt: skip
        pooled_BxD = layer_norm("ln_post", self.dtype)(tokens_BxNxD[:, 0])
        projection_DxE = self.param("projection", normal(D**-0.5, "embed", "joint"), (D, self.embed_dim))
        return pooled_BxD @ projection_DxE.astype(self.dtype), tokens_BxNxD
