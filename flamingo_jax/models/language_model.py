"""The frozen language model: a decoder of the LLaMA family (RMSNorm, rotary positions, SwiGLU).
Dimension letters: see `layers.py`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import RESIDUAL, Array, normal
from flamingo_jax.models.layers import Projection, RMSNorm

Cache = tuple[Array, Array]  # keys and values [B, S, J, K] of one block, or stacked [layers, …] of all


def rotary(x_BxLxHxK: Array, position_BxL: Array, theta: float) -> Array:
    """Rotates the pairs (i, i + K/2) by position · theta^(-2i/K), as LLaMA in Hugging Face's layout does."""
    half = x_BxLxHxK.shape[-1] // 2
    wide = jnp.promote_types(x_BxLxHxK.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle = position_BxL[..., None, None].astype(wide) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BxLxHxK.astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxLxHxK.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)). With a cache, keys and values are written at `start`."""

    heads: int
    kv_heads: int
    mlp_width: int
    rope_theta: float
    norm_eps: float
    out_std: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x_BxLxD: Array, position_BxL: Array, mask_BxLxS: Array, cache: Cache | None = None, start: Any = 0
    ) -> tuple[Array, Cache]:
        D, J = x_BxLxD.shape[-1], self.kv_heads
        G, K = self.heads // J, D // self.heads

        def linear(name: str, spec: str, shape: tuple[int, ...], axes: tuple[str, ...], std: float) -> Projection:
            return Projection(spec, shape, axes, std, self.dtype, name=name)

        y = RMSNorm(self.norm_eps, self.dtype, name="attention_norm")(x_BxLxD)
        q = linear("query", "BLD,DHK->BLHK", (D, self.heads, K), ("embed", "heads", "head_size"), D**-0.5)(y)
        k = linear("key", "BLD,DHK->BLHK", (D, J, K), ("embed", "kv_heads", "head_size"), D**-0.5)(y)
        v = linear("value", "BLD,DHK->BLHK", (D, J, K), ("embed", "kv_heads", "head_size"), D**-0.5)(y)
        q = nn.with_logical_constraint(
            rotary(q, position_BxL, self.rope_theta), ("batch", "length", "heads", "head_size")
        )
        k = rotary(k, position_BxL, self.rope_theta)
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), start, axis=1)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), start, axis=1)

        wide = jnp.promote_types(self.dtype, jnp.float32)
        grouped = q.reshape(*q.shape[:2], J, G, K) * K**-0.5
        logits = jnp.einsum("BLJGK,BSJK->BJGLS", grouped, k, preferred_element_type=wide)
        logits = jnp.where(mask_BxLxS[:, None, None], logits, jnp.finfo(wide).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        y = jnp.einsum("BJGLS,BSJK->BLJGK", weights, v).reshape(q.shape)
        y = linear("out", "BLHK,HKD->BLD", (self.heads, K, D), ("heads", "head_size", "embed"), self.out_std)(y)
        x_BxLxD = nn.with_logical_constraint(x_BxLxD + y, RESIDUAL)

        y = RMSNorm(self.norm_eps, self.dtype, name="mlp_norm")(x_BxLxD)
        gate = linear("gate", "BLD,DM->BLM", (D, self.mlp_width), ("embed", "mlp"), D**-0.5)(y)
        up = linear("up", "BLD,DM->BLM", (D, self.mlp_width), ("embed", "mlp"), D**-0.5)(y)
        hidden = nn.with_logical_constraint(jax.nn.silu(gate) * up, ("batch", "length", "mlp"))
        y = linear("down", "BLM,MD->BLD", (self.mlp_width, D), ("mlp", "embed"), self.out_std)(hidden)
        return nn.with_logical_constraint(x_BxLxD + y, RESIDUAL), (k, v)


class LanguageModel(nn.Module):
    """Token ids [B, L] → logits [B, L, V], float32.

    `mask` [B, L] tells tokens from padding, which may stand on either side; positions count tokens only.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True  # the embedding is the output projection, too
    embedding_std: float = 0.02  # at the start
    dtype: Any = jnp.float32

    def setup(self) -> None:
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ConfigError(
                f"language model of width {self.width}: {self.heads} heads must divide it, "
                f"and {self.kv_heads} key/value heads must divide them"
            )
        if self.width // self.heads % 2:
            raise ConfigError(f"language model: head size {self.width // self.heads} is odd; positions rotate pairs")
        self.embedding_VxD = self.param(
            "embedding", normal(self.embedding_std, "vocab", "embed"), (self.vocab_size, self.width)
        )
        self.blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(**self._block_fields())
        self.final_norm = RMSNorm(self.norm_eps, self.dtype)
        if not self.tied:
            self.head_VxD = self.param(
                "head", normal(self.width**-0.5, "vocab", "embed"), (self.vocab_size, self.width)
            )

    def _block_fields(self) -> dict[str, Any]:
        return dict(
            heads=self.heads,
            kv_heads=self.kv_heads,
            mlp_width=self.mlp_width,
            rope_theta=self.rope_theta,
            norm_eps=self.norm_eps,
            out_std=(2 * self.layers * self.width) ** -0.5,
            dtype=self.dtype,
        )

    def block(self) -> Block:
        """One block by itself, to be applied to a slice of the stacked parameters of `blocks`."""
        return Block(**self._block_fields(), parent=None)

    def embed(self, text_BxL: Array) -> Array:
        return self.embedding_VxD.astype(self.dtype)[text_BxL]

    def logits(self, x_BxLxD: Array) -> tuple[Array, Array]:
        """(logits, what they are read from: x after the last norm)."""
        x_BxLxD = self.final_norm(x_BxLxD)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        head_VxD = self.embedding_VxD if self.tied else self.head_VxD
        logits = jnp.einsum("BLD,VD->BLV", x_BxLxD, head_VxD.astype(self.dtype), preferred_element_type=wide)
        return logits, x_BxLxD

    def __call__(self, text_BxL: Array, mask_BxL: Array | None = None) -> Array:
        if mask_BxL is None:
            mask_BxL = jnp.ones(text_BxL.shape, bool)
        x, position, mask = self.embed(text_BxL), positions(mask_BxL), causal_mask(mask_BxL)
        if self.is_initializing():
            x, _ = self.blocks(x, position, mask)
        else:
            x, _ = run_blocks(self.block(), self.variables["params"]["blocks"], x, position, mask)
        return self.logits(x)[0]


def positions(mask_BxL: Array) -> Array:
    """Positions that count tokens, not padding. [B, L] int32."""
    return jnp.maximum(jnp.cumsum(mask_BxL, axis=1) - 1, 0)


def causal_mask(mask_BxL: Array) -> Array:
    """[B, L, L] bool: a token attends itself and the tokens before it."""
    length = mask_BxL.shape[1]
    return jnp.tril(jnp.ones((length, length), bool)) & mask_BxL[:, None, :]


def run_blocks(
    block: Block, params: Any, x_BxLxD: Array, position_BxL: Array, mask_BxLxS: Array,
    cache: Cache | None = None, start: Any = 0,
) -> tuple[Array, Cache]:  # fmt: skip
    """A scan over stacked blocks: (x, keys and values of each)."""

    def step(x: Array, inputs: tuple[Any, Cache | None]) -> tuple[Array, Cache]:
        layer, kept = inputs
        return block.apply({"params": layer}, x, position_BxL, mask_BxLxS, kept, start)

    return jax.lax.scan(step, x_BxLxD, (params, cache))
