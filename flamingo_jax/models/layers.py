"""Layers that the language model, the resampler and the gated blocks share.

Dimensions, here and in every model file: B batch, L text length, S keys, D width, H heads, J key/value heads,
G heads that share one of them (H = J·G), K head size, M feed-forward width, V vocabulary, E extra tokens,
T images, F frames, N image tokens, R latents, C width of image features.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.layers import Array, normal, ones


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · scale, in float32 or wider."""

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale = self.param("scale", ones("residual"), (x.shape[-1],))
        return (wide * jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.epsilon) * scale).astype(self.dtype)


class Projection(nn.Module):
    """A linear map without bias, spelled as an einsum with a kernel of `shape` and logical `axes`."""

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", normal(self.std, *self.axes), self.shape)
        return jnp.einsum(self.spec, x.astype(self.dtype), kernel.astype(self.dtype))


class SquaredReluMLP(nn.Module):
    """D → M → D, relu(x)² between."""

    mlp_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxLxD: Array) -> Array:
        D, M = x_BxLxD.shape[-1], self.mlp_width
        h = Projection("BLD,DM->BLM", (D, M), ("embed", "mlp"), D**-0.5, self.dtype, name="up")(x_BxLxD)
        h = nn.with_logical_constraint(jnp.square(nn.relu(h)), ("batch", "length", "mlp"))
        return Projection("BLM,MD->BLD", (M, D), ("mlp", "embed"), M**-0.5, self.dtype, name="down")(h)
