"""The transformer block that the ViT and the text towers share, as OpenAI's CLIP has it (pre-LN) or BERT (post-LN).

Dimensions, here and in every model file: B batch, L sequence length, N image tokens, D width,
H heads, K head size, M feed-forward width, E joint embedding, C channels, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.sharding import mesh_axes, take_rows

Array = jax.Array
Dtype = Any
RESIDUAL = ("batch", "length", "residual")  # logical axes of the residual stream
POOLED = ("batch", "residual")  # of what it is pooled to


def quick_gelu(x: Array) -> Array:
    """x·σ(1.702x): the activation of OpenAI's own weights."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """x·Φ(x), in float32 or wider, by erf as in PyTorch.

    jax.nn's is by erfc, whose two branches take TPUs twice the vector operations and their compiler, where a model
    activates what each convolution reads, three times as long.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1 + jax.lax.erf(wide * 2**-0.5))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def normal(std: float, *names: str | None) -> Callable:
    """A normal initialiser of the given standard deviation whose parameter carries logical axes."""
    return nn.with_logical_partitioning(nn.initializers.normal(std), names)


def zeros(*names: str | None) -> Callable:
    return nn.with_logical_partitioning(nn.initializers.zeros_init(), names)


def ones(*names: str | None) -> Callable:
    return nn.with_logical_partitioning(nn.initializers.ones_init(), names)


def layer_norm(name: str | None, dtype: Dtype, epsilon: float = 1e-5, use_bias: bool = True) -> nn.LayerNorm:
    """LayerNorm with CLIP's epsilon (SigLIP's, and Flax's default, is 1e-6); statistics in float32 or wider.

    The two-pass variance costs little and does not cancel where the mean is large.
    """
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=dtype,
        use_bias=use_bias,
        use_fast_variance=False,
        scale_init=ones("residual"),
        bias_init=zeros("residual"),
        name=name,
    )


def look_up(table_VxD: Array, ids_BxL: Array, dtype: Dtype) -> Array:
    """The rows of a table that ids name, [B, L, D].

    On a mesh of several axes XLA would put the rows of the whole batch together on every device, and so in the
    gradient. On one of a single axis, where it uses each device's part of the table's width, it is left to it: with
    `take_rows` the program of ViT-L/14@336 for a v5e:16x16 took 17.2 GiB instead of 14.4.
    """
    rows_BxLxD = take_rows(table_VxD, ids_BxL, dtype) if mesh_axes() > 1 else table_VxD[ids_BxL].astype(dtype)
    return nn.with_logical_constraint(rows_BxLxD, RESIDUAL)


def attention(q_BxLxHxK: Array, k_BxSxHxK: Array, v_BxSxHxK: Array, mask: Array | None = None) -> Array:
    """softmax(q·kᵀ/√K)·v, the softmax in float32 or wider. Returns [B, L, H, K].

    `mask` is boolean and broadcasts against [B, H, L, S]; True marks what may be attended.
    """
    wide = jnp.promote_types(q_BxLxHxK.dtype, jnp.float32)
    scale = q_BxLxHxK.shape[-1] ** -0.5
    logits = jnp.einsum("BLHK,BSHK->BHLS", q_BxLxHxK * scale, k_BxSxHxK, preferred_element_type=wide)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BxSxHxK.dtype)
    return jnp.einsum("BHLS,BSHK->BLHK", weights, v_BxSxHxK)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A kernel with a low-rank addition, W + scale·A·B (arXiv 2106.09685), in the place of the kernel itself.

    A: [..., inputs of W, r]; B: [..., r, outputs of W]. The sum is never made: each factor is applied to x.
    """

    kernel: Any
    a: Array
    b: Array
    scale: float = field(metadata={"static": True})


def multiply(spec: str, x: Array, kernel: Any, dtype: Dtype, preferred: Dtype | None = None) -> Array:
    """einsum(spec, x, kernel) in `dtype`, where the kernel is an array, a `LowRank`, or held in int8.

    Of the latter (qwix's QArray) `qvalue` is multiplied, and the product with `scale`, one number for each output.
    """
    x = x.astype(dtype)
    if isinstance(kernel, LowRank):
        low = jnp.tensordot(x, kernel.a.astype(dtype), kernel.a.ndim - 1)
        added = jnp.tensordot(low, kernel.b.astype(dtype), 1)
        return multiply(spec, x, kernel.kernel, dtype, preferred) + kernel.scale * added
    if not hasattr(kernel, "qvalue"):
        return jnp.einsum(spec, x, kernel.astype(dtype), preferred_element_type=preferred)
    y = jnp.einsum(spec, x, kernel.qvalue.astype(dtype), preferred_element_type=preferred)
    inputs, outputs = spec.split(",")[1].split("->")
    summed = tuple(axis for axis, letter in enumerate(inputs) if letter not in outputs)
    return y * jnp.squeeze(kernel.scale, summed).astype(y.dtype)


class Linear(nn.Module):
    """An affine map over any axes, spelled as an einsum: `spec` multiplies x by a kernel of `shape`.

    `axes` are the kernel's logical axes; the bias has the kernel's last `bias_rank` dimensions.
    (nn.DenseGeneral draws its kernel flat, which no longer fits its logical axes where a mesh is set.)
    """

    spec: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float
    bias_rank: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", normal(self.std, *self.axes), self.shape)
        bias_axes = ("residual",) if self.axes[-1] == "embed" else self.axes[-self.bias_rank :]
        bias = self.param("bias", zeros(*bias_axes), self.shape[-self.bias_rank :])
        return multiply(self.spec, x, kernel, self.dtype) + bias.astype(self.dtype)


def split_heads(width: int, heads: int, name: str, dtype: Dtype) -> Linear:
    """[B, L, D] → [B, L, H, K] with H·K = D."""
    if width % heads:
        raise ConfigError(f"width {width} is not divisible by heads {heads}")
    shape = (width, heads, width // heads)
    return Linear("BLD,DHK->BLHK", shape, ("embed", "heads", "head_size"), width**-0.5, 2, dtype, name=name)


def merge_heads(heads: int, head_size: int, out: int, axis: str, std: float, dtype: Dtype) -> Linear:
    """[B, L, H, K] → [B, L, `out`]; `axis` is the logical name of what comes out."""
    return Linear("BLHK,HKD->BLD", (heads, head_size, out), ("heads", "head_size", axis), std, 1, dtype, name="out")


class Attention(nn.Module):
    """Multi-head self-attention with biases.

    `out_std` is the initial standard deviation of the output projection. A mask (see `attention`) may be given
    where attention isn't causal.
    """

    heads: int
    out_std: float
    causal: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxLxD: Array, mask: Array | None = None) -> Array:
        length, width = x_BxLxD.shape[-2:]

        def project(name: str) -> Array:
            y = split_heads(width, self.heads, name, self.dtype)(x_BxLxD)
            return nn.with_logical_constraint(y, ("batch", "length", "heads", "head_size"))

        mask = jnp.tril(jnp.ones((length, length), bool)) if self.causal else mask
        y_BxLxHxK = attention(project("query"), project("key"), project("value"), mask)
        return merge_heads(self.heads, width // self.heads, width, "embed", self.out_std, self.dtype)(y_BxLxHxK)


class FeedForward(nn.Module):
    """Two linear layers around the activation: D → M → D."""

    mlp_width: int
    activation: str
    out_std: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxLxD: Array) -> Array:
        width = x_BxLxD.shape[-1]
        shape, axes = (width, self.mlp_width), ("embed", "mlp")
        h_BxLxM = Linear("BLD,DM->BLM", shape, axes, (2 * width) ** -0.5, 1, self.dtype, name="up")(x_BxLxD)
        h_BxLxM = nn.with_logical_constraint(ACTIVATIONS[self.activation](h_BxLxM), ("batch", "length", "mlp"))
        return Linear("BLM,MD->BLD", shape[::-1], axes[::-1], self.out_std, 1, self.dtype, name="down")(h_BxLxM)


class Block(nn.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x)); where `post_norm`, LN(x + attention(x)) and so on."""

    heads: int
    mlp_width: int
    activation: str
    out_std: float
    causal: bool = False
    norm_epsilon: float = 1e-5
    post_norm: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxLxD: Array, mask: Array | None = None) -> tuple[Array, None]:
        attention = Attention(self.heads, self.out_std, self.causal, self.dtype, name="attention")
        mlp = FeedForward(self.mlp_width, self.activation, self.out_std, self.dtype, name="mlp")
        for branch, name in ((lambda x: attention(x, mask), "attention_norm"), (mlp, "mlp_norm")):
            norm = layer_norm(name, self.dtype, self.norm_epsilon)
            x_BxLxD = norm(x_BxLxD + branch(x_BxLxD)) if self.post_norm else x_BxLxD + branch(norm(x_BxLxD))
            x_BxLxD = nn.with_logical_constraint(x_BxLxD, RESIDUAL)
        return x_BxLxD, None


REMAT_POLICIES: dict[str, Callable | None] = {
    "full": None,  # keep only each block's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Transformer(nn.Module):
    """`layers` blocks as one scanned block: parameters are stacked on a leading `layers` axis.

    `remat`: "none", or a policy of REMAT_POLICIES: what the backward pass need not recompute.
    """

    layers: int
    heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    causal: bool = False
    norm_epsilon: float = 1e-5
    post_norm: bool = False
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BxLxD: Array, mask: Array | None = None) -> Array:
        block: Any = Block
        if self.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        out_std = x_BxLxD.shape[-1] ** -0.5 * (2 * self.layers) ** -0.5
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(
            self.heads, self.mlp_width, self.activation, out_std, self.causal, self.norm_epsilon, self.post_norm,
            self.dtype, name="blocks",
        )  # fmt: skip
        return blocks(nn.with_logical_constraint(x_BxLxD, RESIDUAL), mask)[0]
