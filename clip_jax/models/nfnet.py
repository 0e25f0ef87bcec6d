"""NFNet (arXiv 2102.06171): a residual network without normalisation layers, Flamingo's vision tower.

Weights are standardised instead, activations scaled to keep a unit normal's variance, and each residual branch is
divided by the standard deviation expected of what it reads (arXiv 2101.08692). The details are those of DeepMind's
own weights as timm's dm_nfnet_f0 to f6 have them. Dimension letters: see `layers.py`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from clip_jax.errors import ConfigError
from clip_jax.models.layers import REMAT_POLICIES, Array, gelu, normal, ones, zeros
from clip_jax.models.resnet import FEATURES, average_pool, convolve

ALPHA = 0.2  # of a residual branch: each block adds α² to the expected variance
GAMMA = 1.7015043497085571  # GELU divides a unit normal's standard deviation by γ
EPSILON = 1e-5  # beside a kernel's variance


def scaled_gelu(x: Array) -> Array:
    return GAMMA * gelu(x)


class ScaledConv(nn.Module):
    """A convolution whose kernel has, for each output channel, mean 0 and variance gain² / fan-in."""

    features: int
    kernel_size: int = 1
    stride: int = 1
    groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxhxwxC: Array) -> Array:
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        init = nn.with_logical_partitioning(init, (None, None, "conv_in", "channels"))
        shape = (self.kernel_size, self.kernel_size, x_BxhxwxC.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", init, shape)
        gain_F = self.param("gain", ones("channels"), (self.features,))
        bias_F = self.param("bias", zeros("channels"), (self.features,))
        mean_F, variance_F = kernel.mean(axis=(0, 1, 2)), kernel.var(axis=(0, 1, 2))
        fan_in = kernel[..., 0].size
        kernel = (kernel - mean_F) * gain_F * lax.rsqrt((variance_F + EPSILON) * fan_in)
        y = convolve(x_BxhxwxC, kernel.astype(self.dtype), self.stride, "SAME", self.groups)
        return y + bias_F.astype(self.dtype)


class SqueezeExcite(nn.Module):
    """Scales each channel by 2σ of what two layers make of all channels' means (arXiv 1709.01507)."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxhxwxC: Array) -> Array:
        C = x_BxhxwxC.shape[-1]

        def linear(x: Array, features: int, name: str) -> Array:
            fields = dict(kernel_init=normal(x.shape[-1] ** -0.5, "conv_in", "channels"), bias_init=zeros("channels"))
            # Each example's channels stay together: split, XLA's partitioner returns wrong gradients (see `convolve`).
            x = nn.with_logical_constraint(x, ("batch", None))
            return nn.with_logical_constraint(
                nn.Dense(features, dtype=self.dtype, name=name, **fields)(x), ("batch", None)
            )

        h_BxM = nn.relu(linear(x_BxhxwxC.mean(axis=(1, 2)), half(C), "squeeze"))
        gate_BxC = nn.sigmoid(linear(h_BxM, C, "excite"))
        return 2 * x_BxhxwxC * gate_BxC[:, None, None]


def half(channels: int) -> int:
    """Half of the channels, in timm's multiples of 8 (of 24: 16)."""
    return (channels // 2 + 4) // 8 * 8


def even(x_BxhxwxC: Array) -> Array:
    """With the last row or column twice where their number is odd: a window's mean is then that of what is there."""
    h, w = x_BxhxwxC.shape[1:3]
    return jnp.pad(x_BxhxwxC, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")


def input_scales(layers: Sequence[int]) -> list[np.ndarray]:
    """β of each block, by stage: the reciprocal of its input's expected standard deviation.

    A block adds α² to the variance; the first of a stage, whose shortcut is of its scaled input, starts from 1 again.
    """
    scales, before = [], 0
    for depth in layers:
        added = np.array([before, *range(1, depth)])
        scales.append((1 + added * ALPHA**2) ** -0.5)
        before = depth
    return scales


class NFBlock(nn.Module):
    """shortcut + α·gain·(1×1, two grouped 3×3, 1×1, squeeze and excite), on the scaled, activated input.

    Where width or size change, the shortcut is a 1×1 of the activated input, after an average pool where there is a
    stride. `scalars`: β, which scales the input, and the rate at which, with `drop`, the branch is left out of an
    example (stochastic depth, arXiv 1603.09382), drawn from the rng `dropout`.
    """

    features: int
    group_size: int
    stride: int = 1
    drop: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxhxwxC: Array, scalars: tuple[Array, Array]) -> tuple[Array, None]:
        beta, rate = scalars
        middle = half(self.features)
        x = (scaled_gelu(x_BxhxwxC) * beta).astype(self.dtype)
        shortcut = x_BxhxwxC
        if self.stride > 1 or x.shape[-1] != self.features:
            pooled = average_pool(even(x), 2) if self.stride > 1 else x
            shortcut = ScaledConv(self.features, dtype=self.dtype, name="shortcut_conv")(pooled)
        groups = middle // self.group_size
        y = ScaledConv(middle, dtype=self.dtype, name="conv1")(x)
        y = ScaledConv(middle, 3, self.stride, groups, self.dtype, name="conv2")(scaled_gelu(y))
        y = ScaledConv(middle, 3, 1, groups, self.dtype, name="conv3")(scaled_gelu(y))
        y = ScaledConv(self.features, dtype=self.dtype, name="conv4")(scaled_gelu(y))
        y = SqueezeExcite(self.dtype, name="squeeze_excite")(y)
        if self.drop:
            kept_B = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, y.shape[:1])
            y = jnp.where(kept_B[:, None, None, None], y / (1 - rate).astype(self.dtype), 0)
        skip_gain = self.param("skip_gain", zeros(), ())  # at the start the block is its shortcut
        y = shortcut + (ALPHA * skip_gain).astype(self.dtype) * y
        return nn.with_logical_constraint(y, FEATURES), None


class NFNet(nn.Module):
    """Pixels [B, h, w, 3] → (pooled [B, E], tokens [B, N, 2·channels[-1]]), of four stages N = ⌈h/32⌉·⌈w/32⌉.

    `layers` and `channels` are the blocks of each stage and their widths. `tokens` are the last activation, row by
    row; `pooled` is their mean, projected. Of a stage all blocks but the first are one scanned block. `image_size` is
    what the data are cut to: the weights take images of any size.

    `drop_path` is the rate at which the last block is dropped in training, the others in proportion to their place.
    `remat`: see `Transformer`.
    """

    image_size: int
    layers: Sequence[int]
    channels: Sequence[int]
    stem_width: int
    group_size: int
    embed_dim: int
    drop_path: float = 0.0
    remat: str = "none"
    dtype: Any = jnp.float32

    num_prefix_tokens = 0

    @nn.compact
    def __call__(self, image_Bxhxwx3: Array, train: bool = False) -> tuple[Array, Array]:
        self._check()
        x = image_Bxhxwx3.astype(self.dtype)
        for i, stride in enumerate((2, 1, 1, 2), 1):
            x = scaled_gelu(x) if i > 1 else x
            x = ScaledConv(self.stem_width * 2**i // 16, 3, stride, dtype=self.dtype, name=f"stem_conv{i}")(x)
        x = nn.with_logical_constraint(x, FEATURES)

        places = np.split(np.arange(sum(self.layers)), np.cumsum(self.layers)[:-1])
        for stage, (place_N, beta_N) in enumerate(zip(places, input_scales(self.layers), strict=True)):
            rate_N = self.drop_path * place_N / max(sum(self.layers) - 1, 1)
            x = self._stage(x, stage, jnp.asarray(beta_N), jnp.asarray(rate_N), train and self.drop_path > 0)

        x = ScaledConv(2 * self.channels[-1], dtype=self.dtype, name="final_conv")(x)
        x = nn.with_logical_constraint(scaled_gelu(x), FEATURES)
        C = x.shape[-1]
        tokens_BxNxC = x.reshape(x.shape[0], -1, C)
        projection_CxE = self.param("projection", normal(C**-0.5, "embed", "joint"), (C, self.embed_dim))
        return tokens_BxNxC.mean(axis=1) @ projection_CxE.astype(self.dtype), tokens_BxNxC

    def _stage(self, x: Array, stage: int, beta_N: Array, rate_N: Array, drop: bool) -> Array:
        fields = dict(features=self.channels[stage], group_size=self.group_size, drop=drop, dtype=self.dtype)
        first: Any = NFBlock
        rest: Any = NFBlock
        if self.remat != "none":
            policy = REMAT_POLICIES[self.remat]
            first, rest = nn.remat(NFBlock, policy=policy), nn.remat(NFBlock, prevent_cse=False, policy=policy)
        stride = 2 if stage > 0 else 1
        x, _ = first(stride=stride, name=f"stage{stage + 1}_first", **fields)(x, (beta_N[0], rate_N[0]))
        if len(beta_N) == 1:
            return x
        blocks = nn.scan(
            rest,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=len(beta_N) - 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(name=f"stage{stage + 1}_rest", **fields)
        return blocks(x, (beta_N[1:], rate_N[1:]))[0]

    def _check(self) -> None:
        if len(self.layers) != len(self.channels) or min(self.layers) < 1:
            raise ConfigError(f"NFNet of layers {self.layers} and channels {self.channels}: one of each for each stage")
        for width in (self.stem_width, *self.channels):
            if width % 8:
                raise ConfigError(f"NFNet of stem_width {self.stem_width} and channels {self.channels}: multiples of 8")
        for width in self.channels:
            if self.group_size < 1 or half(width) % self.group_size:
                raise ConfigError(f"NFNet: group_size {self.group_size} does not divide {half(width)}, half of {width}")
