"""The Perceiver resampler (arXiv 2204.14198 §2.1, appendix A.1.1), and the Transformer and the MLP that the paper
compares it with (table 3, vi). Dimension letters: see `layers.py`.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import RESIDUAL, Array, attention, layer_norm, normal
from flamingo_jax.models.layers import FeedForward, Projection

KINDS = ("perceiver", "transformer", "mlp")


class ResamplerBlock(nn.Module):
    """x + attention(x → [features, x]), then + feed-forward; x are the latents of a Perceiver.

    In a Transformer x are the features themselves, of which `mask` tells those that may be attended; an MLP has no
    attention.
    """

    kind: str
    heads: int
    head_size: int
    mlp_width: int
    activation: str
    qk_norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BxRxD: Array, features_BxSxD: Array | None, mask_BxS: Array) -> tuple[Array, None]:
        if self.kind != "mlp":
            x_BxRxD = x_BxRxD + self._attention(x_BxRxD, features_BxSxD, mask_BxS)
        x_BxRxD = nn.with_logical_constraint(x_BxRxD, RESIDUAL)
        y = layer_norm("mlp_norm", self.dtype)(x_BxRxD)
        x_BxRxD = x_BxRxD + FeedForward(self.mlp_width, self.activation, self.dtype, name="mlp")(y)
        return nn.with_logical_constraint(x_BxRxD, RESIDUAL), None

    def _attention(self, x_BxRxD: Array, features_BxSxD: Array | None, mask_BxS: Array) -> Array:
        D, H, K = x_BxRxD.shape[-1], self.heads, self.head_size
        latents = context = layer_norm("latents_norm", self.dtype)(x_BxRxD)
        seen = mask_BxS
        if features_BxSxD is not None:
            context = jnp.concatenate([layer_norm("features_norm", self.dtype)(features_BxSxD), latents], axis=1)
            seen = jnp.concatenate([mask_BxS, jnp.ones(latents.shape[:2], bool)], axis=1)

        def split(name: str) -> Projection:
            return Projection(
                "BLD,DHK->BLHK", (D, H, K), ("embed", "heads", "head_size"), D**-0.5, self.dtype, name=name
            )

        query, key = split("query")(latents), split("key")(context)
        if self.qk_norm:
            query, key = layer_norm("query_norm", self.dtype)(query), layer_norm("key_norm", self.dtype)(key)
        y = attention(query, key, split("value")(context), seen[:, None, None])
        out_axes = ("heads", "head_size", "embed")
        return Projection("BLHK,HKD->BLD", (H, K, D), out_axes, (H * K) ** -0.5, self.dtype, name="out")(y)


class Resampler(nn.Module):
    """Features of F frames [B, F, N, C] → `latents` tokens [B, R, D], whatever F and N are.

    A "transformer" and an "mlp" have no latents: they return a token for each feature [B, F·N, D], and those of
    padded frames are for nobody to attend (`Flamingo.image_mask`).
    A learned embedding tells the frames apart; for more frames than were trained it is interpolated linearly.
    There is no encoding of the place within a frame. `frame_mask` [B, F]: False for padding.
    The replicas have no embedding of time; IDEFICS normalises every head's queries and keys.
    """

    width: int
    layers: int
    heads: int
    head_size: int
    latents: int = 64
    frames: int = 8
    time_embedding: bool = True
    activation: str = "squared_relu"
    qk_norm: bool = False
    kind: str = "perceiver"
    dtype: Any = jnp.float32

    @property
    def has_latents(self) -> bool:
        return self.kind == "perceiver"

    @nn.compact
    def __call__(self, features_BxFxNxC: Array, frame_mask_BxF: Array) -> Array:
        if self.kind not in KINDS:
            raise ConfigError(f"resampler.kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        B, F, N, C = features_BxFxNxC.shape
        D = self.width
        x = features_BxFxNxC.astype(self.dtype)
        if C != D:
            x = Projection("BFNC,CD->BFND", (C, D), ("features", "embed"), C**-0.5, self.dtype, name="project")(x)
        if self.time_embedding:
            time_FxD = self.param("time_embedding", normal(0.02, None, "embed"), (self.frames, D))
            x = x + interpolate_time(time_FxD, F).astype(self.dtype)[:, None]
        x_BxSxD, features = x.reshape(B, F * N, D), None
        if self.has_latents:
            latents_RxD = self.param("latents", normal(0.02, None, "embed"), (self.latents, D))
            x_BxSxD, features = jnp.broadcast_to(latents_RxD.astype(self.dtype), (B, self.latents, D)), x_BxSxD
        blocks = nn.scan(
            ResamplerBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.kind, self.heads, self.head_size, 4 * D, self.activation, self.qk_norm, self.dtype, name="blocks")
        x_BxSxD, _ = blocks(x_BxSxD, features, jnp.repeat(frame_mask_BxF, N, axis=1))
        return layer_norm("final_norm", self.dtype)(x_BxSxD)


def interpolate_time(embedding_FxD: Array, frames: int) -> Array:
    """[frames, D]: the first ones, or as many interpolated between the first and the last (as for 30 of 8)."""
    trained = embedding_FxD.shape[0]
    if frames < 1:
        raise ConfigError("an image place without a frame: expected at least 1")
    if frames <= trained:
        return embedding_FxD[:frames]
    at = jnp.linspace(0, trained - 1, frames, dtype=embedding_FxD.dtype)
    return jax.vmap(lambda column: jnp.interp(at, jnp.arange(trained), column), 1, 1)(embedding_FxD)
