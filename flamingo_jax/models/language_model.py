"""The language model that Flamingo freezes: one pre-norm decoder, which `DecoderSpec` makes a Chinchilla
(arXiv 2203.15556), LLaMA (2302.13971), GPT-2, GPT-NeoX (2204.06745), OPT (2205.01068) or MPT.
Dimension letters: see `layers.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import ConfigError
from clip_jax.models.layers import RESIDUAL, Array, layer_norm, look_up, multiply, normal, zeros
from flamingo_jax.models.layers import ACTIVATIONS, Projection, RMSNorm, feed_forward
from flamingo_jax.models.positions import RopeScaling, alibi, frequencies, relative_logits, rotary, sinusoids

KeyValue = tuple[Array, Array]  # of one block, [B, J, S, K] each

CHOICES = {
    "norm": ("rms", "layer"),
    "positions": ("rotary", "learned", "alibi", "relative"),
    "activation": ("swiglu", *ACTIVATIONS),
    "rope_scaling": ("none", "linear", "llama3", "yarn"),
}


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes, and where the families differ; the defaults are LLaMA's. Raises ConfigError where they don't fit."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int  # fewer than heads: each is shared by a group of them (arXiv 2305.13245)
    mlp_width: int
    norm: str = "rms"  # or "layer"
    norm_eps: float = 1e-5
    qk_norm: bool = False  # of all heads' queries and of all heads' keys together
    positions: str = "rotary"  # or "learned", "alibi" (arXiv 2108.12409), "relative" (Transformer-XL, 1901.02860)
    rope_theta: float = 10000.0
    rotary_fraction: float = 1.0  # of each head
    rope_scaling: str = "none"  # or "linear", "llama3", "yarn": see `positions.RopeScaling`, whose fields follow
    rope_factor: float = 1.0
    rope_original: int = 0
    rope_low: float = 1.0
    rope_high: float = 1.0
    rope_magnitude: float = 1.0
    max_positions: int = 0  # learned ones
    position_offset: int = 0  # rows of their table that no token uses, at its start
    activation: str = "swiglu"
    parallel_residual: bool = False  # attention and feed-forward read the same x
    biases: bool = False  # in linear maps and LayerNorms
    tied: bool = True  # the embedding is the output projection, too
    embedding_std: float = 0.02  # at the start

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"language model: {name} is {value!r}; expected one of {', '.join(allowed)}")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ConfigError(
                f"language model of width {self.width}: {self.heads} heads must divide it, "
                f"and {self.kv_heads} key/value heads must divide them"
            )
        if self.positions == "rotary" and self.rotary_size % 2:
            raise ConfigError(
                f"language model: {self.rotary_size} of head size {self.head_size} is odd; positions rotate pairs"
            )
        mixed = self.rope_scaling in ("llama3", "yarn")
        if self.rope_factor <= 0 or (mixed and not (0 < self.rope_low < self.rope_high and self.rope_original > 0)):
            raise ConfigError(
                f"language model: rope_scaling {self.rope_scaling!r} with rope_factor {self.rope_factor}, rope_low "
                f"{self.rope_low}, rope_high {self.rope_high}, rope_original {self.rope_original}; expected numbers "
                "above 0, and low < high"
            )
        if self.positions == "learned" and self.max_positions < 1:
            raise ConfigError(f"language model: max_positions is {self.max_positions}; learned ones need at least 1")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def rotary_size(self) -> int:
        return int(self.head_size * self.rotary_fraction)

    @property
    def rotary_frequencies(self) -> np.ndarray:
        """float64 [rotary_size/2]: see `positions.frequencies`."""
        scaling = RopeScaling(
            self.rope_scaling, self.rope_factor, self.rope_original, self.rope_low, self.rope_high, self.rope_magnitude
        )
        return frequencies(self.rotary_size, self.rope_theta, scaling)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): (x, keys and values of all slots).

    With a cache, keys and values are written into it from slot `start` on. `between` is applied to x between the two;
    where the residual is parallel nothing is.

    Slots: the place of a query or key in the row, padding included. Relative positions are differences of slots,
    which are those of tokens, as padding stands before or after a text.
    """

    spec: DecoderSpec
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BxLxD: Array, position_BxL: Array, mask_BxLxS: Array, cache: KeyValue | None = None, start: Any = 0,
        between: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Array, KeyValue]:  # fmt: skip
        y, kept = self.attention(self.norm("attention_norm")(x_BxLxD), position_BxL, mask_BxLxS, cache, start)
        if self.spec.parallel_residual:
            y = y + self.feed_forward(self.norm("mlp_norm")(x_BxLxD))
            return nn.with_logical_constraint(x_BxLxD + y, RESIDUAL), kept
        x_BxLxD = between(nn.with_logical_constraint(x_BxLxD + y, RESIDUAL))
        y = self.feed_forward(self.norm("mlp_norm")(x_BxLxD))
        return nn.with_logical_constraint(x_BxLxD + y, RESIDUAL), kept

    def norm(self, name: str) -> nn.Module:
        return make_norm(self.spec, name, self.dtype)

    @property
    def out_std(self) -> float:
        return (2 * self.spec.layers * self.spec.width) ** -0.5

    def attention(
        self, y_BxLxD: Array, position_BxL: Array, mask_BxLxS: Array, cache: KeyValue | None, start: Any
    ) -> tuple[Array, KeyValue]:
        spec, dtype = self.spec, self.dtype
        D, H, J, K = spec.width, spec.heads, spec.kv_heads, spec.head_size
        G, L, S = H // J, y_BxLxD.shape[1], mask_BxLxS.shape[-1]

        def project(name: str, heads: int, axis: str) -> Array:
            axes = ("embed", axis, "head_size")
            bias_rank = 2 if spec.biases else 0
            y = Projection("BLD,DHK->BLHK", (D, heads, K), axes, D**-0.5, dtype, bias_rank, name=name)(y_BxLxD)
            if spec.qk_norm and name != "value":
                y = self.norm(f"{name}_norm")(y.reshape(*y.shape[:2], heads * K)).reshape(y.shape)
            return y

        q, k, v = project("query", H, "heads"), project("key", J, "kv_heads"), project("value", J, "kv_heads")
        if spec.positions == "rotary":
            q = rotary(q, position_BxL, spec.rotary_frequencies, spec.rope_magnitude)
            k = rotary(k, position_BxL, spec.rotary_frequencies, spec.rope_magnitude)
        q = nn.with_logical_constraint(q, ("batch", "length", "heads", "head_size"))
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # as the products below read them: a cache is never transposed
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), start, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), start, axis=2)

        wide = jnp.promote_types(dtype, jnp.float32)
        grouped = q.reshape(*q.shape[:2], J, G, K)
        if spec.positions == "relative":  # Transformer-XL's u and v: what a query prefers wherever it stands
            u_JxGxK, v_JxGxK = (
                self.param(name, zeros("heads", "head_size"), (H, K)).astype(dtype).reshape(J, G, K)
                for name in ("content_bias", "position_bias")
            )
            axes = ("embed", "heads", "head_size")
            distance_T = start + L - jnp.arange(L + S)  # from the last query's to the first slot, to far ahead
            r = Projection("TD,DHK->THK", (D, H, K), axes, D**-0.5, dtype, name="position")(sinusoids(distance_T, D))
            bias = relative_logits((grouped + v_JxGxK) * K**-0.5, r.reshape(L + S, J, G, K), S, wide)
            grouped = grouped + u_JxGxK
        logits = jnp.einsum("BLJGK,BJSK->BJGLS", grouped * K**-0.5, k, preferred_element_type=wide)
        if spec.positions == "relative":
            logits = logits + bias
        if spec.positions == "alibi":
            distance_LxS = start + jnp.arange(L)[:, None] - jnp.arange(S)
            logits = logits + alibi(H, distance_LxS, wide).reshape(J, G, L, S)
        logits = jnp.where(mask_BxLxS[:, None, None], logits, jnp.finfo(wide).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
        y = jnp.einsum("BJGLS,BJSK->BLJGK", weights, v).reshape(q.shape)
        axes = ("heads", "head_size", "embed")
        out = Projection("BLHK,HKD->BLD", (H, K, D), axes, self.out_std, dtype, int(spec.biases), name="out")
        return out(y), (k, v)

    def feed_forward(self, y_BxLxD: Array) -> Array:
        spec = self.spec
        return feed_forward(y_BxLxD, spec.mlp_width, spec.activation, self.out_std, self.dtype, spec.biases)


class LanguageModel(nn.Module):
    """Token ids [B, L] → logits [B, L, V], float32.

    `mask` [B, L] tells tokens from padding, which may stand on either side; positions count tokens only.
    """

    spec: DecoderSpec
    dtype: Any = jnp.float32

    vocab_size = property(lambda self: self.spec.vocab_size)
    width = property(lambda self: self.spec.width)
    layers = property(lambda self: self.spec.layers)
    heads = property(lambda self: self.spec.heads)
    kv_heads = property(lambda self: self.spec.kv_heads)

    def setup(self) -> None:
        spec = self.spec
        self.embedding_VxD = self.param(
            "embedding", normal(spec.embedding_std, "vocab", "embed"), (spec.vocab_size, spec.width)
        )
        if spec.positions == "learned":
            self.position_embedding_PxD = self.param(
                "position_embedding",
                normal(spec.embedding_std, None, "embed"),
                (spec.max_positions + spec.position_offset, spec.width),
            )
        self.blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=spec.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(spec, self.dtype)
        self.final_norm = make_norm(spec, None, self.dtype)
        if not spec.tied:
            self.head_VxD = self.param(
                "head", normal(spec.width**-0.5, "vocab", "embed"), (spec.vocab_size, spec.width)
            )

    def block(self) -> Block:
        """One block by itself, to be applied to a slice of the stacked parameters of `blocks`."""
        return Block(self.spec, self.dtype, parent=None)

    def embed(self, text_BxL: Array) -> Array:
        table = self.embedding_VxD
        if hasattr(table, "qvalue"):  # held in int8, with a scale for each row
            return table.qvalue[text_BxL].astype(self.dtype) * table.scale[text_BxL].astype(self.dtype)
        return look_up(table, text_BxL, self.dtype)

    def place(self, x_BxLxD: Array, position_BxL: Array, slots: int) -> Array:
        """x with learned positions added, where the model has such; rows have `slots` places.

        Raises ConfigError for rows longer than the table.
        """
        if self.spec.positions != "learned":
            return x_BxLxD
        if slots > self.spec.max_positions:
            raise ConfigError(f"a row of {slots} tokens: this language model has {self.spec.max_positions} positions")
        return x_BxLxD + self.position_embedding_PxD.astype(self.dtype)[position_BxL + self.spec.position_offset]

    def logits(self, x_BxLxD: Array) -> tuple[Array, Array]:
        """(logits, what they are read from: x after the last norm)."""
        x_BxLxD = self.final_norm(x_BxLxD)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        head_VxD = self.embedding_VxD if self.spec.tied else self.head_VxD
        return multiply("BLD,VD->BLV", x_BxLxD, head_VxD, self.dtype, wide), x_BxLxD

    def __call__(self, text_BxL: Array, mask_BxL: Array | None = None) -> Array:
        if mask_BxL is None:
            mask_BxL = jnp.ones(text_BxL.shape, bool)
        position, mask = positions(mask_BxL), causal_mask(mask_BxL)
        x = self.place(self.embed(text_BxL), position, text_BxL.shape[1])
        if self.is_initializing():
            x, _ = self.blocks(x, position, mask)
        else:
            x = run_blocks(self.block(), self.variables["params"]["blocks"], x, position, mask)
        return self.logits(x)[0]


def make_norm(spec: DecoderSpec, name: str | None, dtype: Any) -> nn.Module:
    if spec.norm == "rms":
        return RMSNorm(spec.norm_eps, dtype, name=name)
    return layer_norm(name, dtype, spec.norm_eps, spec.biases)


def positions(mask_BxL: Array) -> Array:
    """Positions that count tokens, not padding. [B, L] int32."""
    return jnp.maximum(jnp.cumsum(mask_BxL, axis=1) - 1, 0)


def causal_mask(mask_BxL: Array) -> Array:
    """[B, L, L] bool: a token attends itself and the tokens before it."""
    length = mask_BxL.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & mask_BxL[:, None, :]


def run_blocks(block: Block, params: Any, x_BxLxD: Array, position_BxL: Array, mask_BxLxS: Array) -> Array:
    """A scan over stacked blocks."""

    def step(x: Array, layer: Any) -> tuple[Array, None]:
        return block.apply({"params": layer}, x, position_BxL, mask_BxLxS)[0], None

    return jax.lax.scan(step, x_BxLxD, params)[0]
