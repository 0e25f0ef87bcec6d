"""CLIP's ResNet (arXiv 2103.00020 §2.4): three-convolution stem, anti-aliased strides, attention pool.
Dimension letters: see `layers.py`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from clip_jax.errors import ConfigError
from clip_jax.models.layers import Array, attention, merge_heads, normal, ones, split_heads, zeros
from clip_jax.sharding import on_own_examples

# Logical axes of a feature map [B, h, w, C]; for its channels see `Conv`.
FEATURES = ("batch", None, None, None)


def convolve(x_BxhxwxC: Array, kernel: Array, stride: int, padding: Any, groups: int = 1) -> Array:
    """A convolution with a kernel [height, width, C / groups, features]; `padding` as lax has it.

    A 1×1 convolution is spelled as the matrix product that it is: XLA's CPU backend takes 4 times as long
    for the gradients of the convolution.
    """
    # Stored in parts, used whole: given both a split batch and split channels, XLA's partitioner returns
    # wrong gradients of convolutions on a (2, 2, 2) mesh, under a right loss (jax 0.10.2); of a grouped one it
    # returns as many times a kernel's gradient as the tensor axis is long. So it sees none.
    kernel = nn.with_logical_constraint(kernel, (None, None, None, None))
    if kernel.shape[:2] == (1, 1) and stride == 1 and groups == 1:
        return jnp.einsum("BhwC,CF->BhwF", x_BxhxwxC, kernel[0, 0])

    def convolution(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return on_own_examples(convolution, x_BxhxwxC, kernel)


class Conv(nn.Module):
    """A convolution without bias, its padding symmetric as in the peer ("SAME" is not, under a stride)."""

    features: int
    kernel_size: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxhxwxC: Array) -> Array:
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        init = nn.with_logical_partitioning(init, (None, None, "conv_in", "channels"))
        size = self.kernel_size
        kernel = self.param("kernel", init, (size, size, x_BxhxwxC.shape[-1], self.features)).astype(self.dtype)
        return convolve(x_BxhxwxC, kernel, self.stride, [(size // 2, size // 2)] * 2)


def batch_norm(train: bool, name: str, dtype: Any, zero_scale: bool = False) -> nn.BatchNorm:
    """Statistics are those of the global batch: under jit a mean over a sharded axis is the whole mean."""
    scale_init = zeros("channels") if zero_scale else ones("channels")
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        dtype=dtype,
        scale_init=scale_init,
        bias_init=zeros("channels"),
        name=name,
    )


def average_pool(x_BxhxwxC: Array, stride: int) -> Array:
    """Mean of each stride × stride window; what does not fill a window is dropped."""
    B, h, w, C = x_BxhxwxC.shape
    h, w = h // stride, w // stride
    x = x_BxhxwxC[:, : h * stride, : w * stride].reshape(B, h, stride, w, stride, C)
    return x.mean(axis=(2, 4))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 (4 × wider); a stride is an average pool after the 3×3 and before the shortcut's 1×1."""

    features: int
    stride: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxhxwxC: Array, train: bool) -> Array:
        out = 4 * self.features
        y = nn.relu(
            batch_norm(train, "bn1", self.dtype)(Conv(self.features, 1, dtype=self.dtype, name="conv1")(x_BxhxwxC))
        )
        y = nn.relu(batch_norm(train, "bn2", self.dtype)(Conv(self.features, 3, dtype=self.dtype, name="conv2")(y)))
        y = average_pool(y, self.stride) if self.stride > 1 else y
        y = batch_norm(train, "bn3", self.dtype, zero_scale=True)(Conv(out, 1, dtype=self.dtype, name="conv3")(y))
        if self.stride > 1 or x_BxhxwxC.shape[-1] != out:
            x = average_pool(x_BxhxwxC, self.stride) if self.stride > 1 else x_BxhxwxC
            shortcut = batch_norm(train, "shortcut_bn", self.dtype)(
                Conv(out, 1, dtype=self.dtype, name="shortcut_conv")(x)
            )
        else:
            shortcut = x_BxhxwxC
        return nn.with_logical_constraint(nn.relu(shortcut + y), FEATURES)


class AttentionPool(nn.Module):
    """One query, the mean of the grid, attends to [mean, grid] with projections of its own."""

    heads: int
    embed_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens_BxNxC: Array) -> Array:
        C = tokens_BxNxC.shape[-1]
        x_BxNxC = jnp.concatenate([tokens_BxNxC.mean(axis=1, keepdims=True), tokens_BxNxC], axis=1)
        position = self.param("position_embedding", normal(C**-0.5, None, "embed"), x_BxNxC.shape[1:])
        x_BxNxC = x_BxNxC + position.astype(self.dtype)

        query, key, value = (split_heads(C, self.heads, n, self.dtype) for n in ("query", "key", "value"))
        y_Bx1xHxK = attention(query(x_BxNxC[:, :1]), key(x_BxNxC), value(x_BxNxC))
        out = merge_heads(self.heads, C // self.heads, self.embed_dim, "joint", C**-0.5, self.dtype)
        return out(y_Bx1xHxK)[:, 0]


class ResNet(nn.Module):
    """Pixels [B, S, S, 3] → (pooled [B, E], tokens [B, h·w, 32·width]).

    `layers` are the blocks of each stage; `tokens` are the last stage's feature map, row by row.
    Needs the collection `batch_stats`, mutable where `train` is true.
    """

    image_size: int
    width: int
    layers: Sequence[int]
    heads: int
    embed_dim: int
    dtype: Any = jnp.float32

    num_prefix_tokens = 0

    @nn.compact
    def __call__(self, image_BxSxSx3: Array, train: bool = False) -> tuple[Array, Array]:
        if image_BxSxSx3.shape[1:3] != (self.image_size, self.image_size):
            height, width = image_BxSxSx3.shape[1:3]
            raise ConfigError(f"image of {height}×{width} pixels: expected {self.image_size}×{self.image_size}")
        x = image_BxSxSx3.astype(self.dtype)
        for i, (features, stride) in enumerate([(self.width // 2, 2), (self.width // 2, 1), (self.width, 1)], 1):
            x = Conv(features, 3, stride, self.dtype, name=f"stem_conv{i}")(x)
            x = nn.relu(batch_norm(train, f"stem_bn{i}", self.dtype)(x))
        x = nn.with_logical_constraint(average_pool(x, 2), FEATURES)
        for stage, blocks in enumerate(self.layers):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Bottleneck(self.width * 2**stage, stride, self.dtype, name=f"stage{stage + 1}_block{block}")(
                    x, train
                )
        tokens_BxNxC = x.reshape(x.shape[0], -1, x.shape[-1])
        return AttentionPool(self.heads, self.embed_dim, self.dtype, name="pool")(tokens_BxNxC), tokens_BxNxC
