"""Layers that the language model, the resampler and the gated blocks share.

Dimensions, here and in every model file: B batch, L text length, S keys, D width, H heads, J key/value heads,
G heads that share one of them (H = J·G), K head size, M feed-forward width, V vocabulary, E extra tokens,
T images, F frames, N image tokens, R latents, C width of image features.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models import layers as clip_layers
from clip_jax.models.layers import Array, multiply, normal, ones, zeros

# Between the two maps of a feed-forward; beside these there is "swiglu" (arXiv 2002.05202), whose third map gates.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    **clip_layers.ACTIVATIONS,
    "relu": nn.relu,
    "squared_relu": lambda x: jnp.square(nn.relu(x)),  # arXiv 2109.08668
}


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
    """A linear map, spelled as an einsum with a kernel of `shape` and logical `axes`.

    The bias, if any, has the kernel's last `bias_rank` dimensions.
    """

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float
    dtype: Any = jnp.float32
    bias_rank: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", normal(self.std, *self.axes), self.shape)
        y = multiply(self.spec, x, kernel, self.dtype)
        if not self.bias_rank:
            return y
        axes = ("residual",) if self.axes[-1] == "embed" else self.axes[-self.bias_rank :]
        return y + self.param("bias", zeros(*axes), self.shape[-self.bias_rank :]).astype(self.dtype)


def feed_forward(
    x_BxLxD: Array, mlp_width: int, activation: str, out_std: float, dtype: Any, biases: bool = False
) -> Array:
    """D → M → D by maps `up`, `down` and, for "swiglu", `gate`, which belong to the module that calls this."""
    D, M = x_BxLxD.shape[-1], mlp_width

    def linear(name: str, spec: str, shape: tuple[int, int], axes: tuple[str, str], std: float) -> Projection:
        return Projection(spec, shape, axes, std, dtype, int(biases), name=name)

    if activation == "swiglu":
        gate = linear("gate", "BLD,DM->BLM", (D, M), ("embed", "mlp"), D**-0.5)(x_BxLxD)
        up = linear("up", "BLD,DM->BLM", (D, M), ("embed", "mlp"), D**-0.5)(x_BxLxD)
        hidden = jax.nn.silu(gate) * up
    else:
        up = linear("up", "BLD,DM->BLM", (D, M), ("embed", "mlp"), D**-0.5)(x_BxLxD)
        hidden = ACTIVATIONS[activation](up)
    hidden = nn.with_logical_constraint(hidden, ("batch", "length", "mlp"))
    return linear("down", "BLM,MD->BLD", (M, D), ("mlp", "embed"), out_std)(hidden)


class FeedForward(nn.Module):
    """`feed_forward` as a module of its own."""

    mlp_width: int
    activation: str = "squared_relu"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxLxD: Array) -> Array:
        return feed_forward(x_BxLxD, self.mlp_width, self.activation, self.mlp_width**-0.5, self.dtype)
