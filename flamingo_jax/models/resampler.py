"""The Perceiver resampler (arXiv 2204.14198 §2.1, appendix A.1.1). Dimension letters: see `layers.py`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import Array, attention, layer_norm, normal
from flamingo_jax.models.layers import FeedForward, Projection


class ResamplerBlock(nn.Module):
    """latents + attention(latents → [features, latents]), then + feed-forward."""

    heads: int
    head_size: int
    mlp_width: int
    activation: str
    qk_norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents_BxRxD: Array, features_BxSxD: Array, mask_BxS: Array) -> tuple[Array, None]:
        D, H, K = latents_BxRxD.shape[-1], self.heads, self.head_size
        features = layer_norm("features_norm", self.dtype)(features_BxSxD)
        latents = layer_norm("latents_norm", self.dtype)(latents_BxRxD)
        context = jnp.concatenate([features, latents], axis=1)
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
        y = Projection("BLHK,HKD->BLD", (H, K, D), out_axes, (H * K) ** -0.5, self.dtype, name="out")(y)
        latents_BxRxD = latents_BxRxD + y
        y = layer_norm("mlp_norm", self.dtype)(latents_BxRxD)
        return latents_BxRxD + FeedForward(self.mlp_width, self.activation, self.dtype, name="mlp")(y), None


class PerceiverResampler(nn.Module):
    """Features of F frames [B, F, N, C] → `latents` tokens [B, R, D], whatever F and N are.

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
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features_BxFxNxC: Array, frame_mask_BxF: Array) -> Array:
        B, F, N, C = features_BxFxNxC.shape
        D = self.width
        x = features_BxFxNxC.astype(self.dtype)
        if C != D:
            x = Projection("BFNC,CD->BFND", (C, D), ("features", "embed"), C**-0.5, self.dtype, name="project")(x)
        if self.time_embedding:
            time_FxD = self.param("time_embedding", normal(0.02, None, "embed"), (self.frames, D))
            x = x + interpolate_time(time_FxD, F).astype(self.dtype)[:, None]
        latents_RxD = self.param("latents", normal(0.02, None, "embed"), (self.latents, D))
        latents = jnp.broadcast_to(latents_RxD.astype(self.dtype), (B, self.latents, D))
        blocks = nn.scan(
            ResamplerBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.heads, self.head_size, 4 * D, self.activation, self.qk_norm, self.dtype, name="blocks")
        seen_BxS = jnp.repeat(frame_mask_BxF, N, axis=1)
        latents, _ = blocks(latents, x.reshape(B, F * N, D), seen_BxS)
        return layer_norm("final_norm", self.dtype)(latents)


def interpolate_time(embedding_FxD: Array, frames: int) -> Array:
    """[frames, D]: the first ones, or as many interpolated between the first and the last (as for 30 of 8)."""
    trained = embedding_FxD.shape[0]
    if frames < 1:
        raise ConfigError("an image place without a frame: expected at least 1")
    if frames <= trained:
        return embedding_FxD[:frames]
    at = jnp.linspace(0, trained - 1, frames, dtype=embedding_FxD.dtype)
    return jax.vmap(lambda column: jnp.interp(at, jnp.arange(trained), column), 1, 1)(embedding_FxD)
