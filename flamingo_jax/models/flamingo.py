"""Flamingo (arXiv 2204.14198 §2): a frozen vision tower and a frozen language model, joined by a resampler and by
gated cross-attention before the language model's blocks 0, n, 2n, … OpenFlamingo and IDEFICS are the same model
with other fields. Dimension letters: see `layers.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.models.layers import Array, normal
from flamingo_jax.models.gated_attention import GatedCrossAttention, GatedSpec
from flamingo_jax.models.language_model import KeyValue, LanguageModel, causal_mask, positions, run_blocks
from flamingo_jax.models.resampler import PerceiverResampler


class Flamingo(nn.Module):
    """Batch → logits [B, L, V + extra_tokens], float32.

    A batch holds `media` [B, T, F, S, S, 3] (T images or clips of F frames, normalised), `frame_mask` [B, T, F],
    `text` [B, L], `text_mask` [B, L] and `media_mask` [B, L, T]: which images a token attends. The model makes
    none of these masks itself. Ids from the language model's vocabulary size on are the extra tokens, trained.
    Gated blocks stand before blocks f, f + n, f + 2n, … (f `first_block`, n `interval`).
    """

    vision: nn.Module
    resampler: PerceiverResampler
    language_model: LanguageModel
    interval: int
    heads: int
    head_size: int
    gated_spec: GatedSpec = GatedSpec()
    first_block: int = 0
    class_token: bool = True  # whether the resampler looks at the tower's class token, where it has one
    extra_tokens: int = 1
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        width = self.language_model.width
        self.gated = nn.scan(
            GatedCrossAttention,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.gated_blocks,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(**self._gated_fields())
        self.extra_embedding_ExD = self.param(
            "extra_embedding", normal(0.02, None, "embed"), (self.extra_tokens, width)
        )
        self.extra_head_ExD = self.param("extra_head", normal(0.02, None, "embed"), (self.extra_tokens, width))

    def _gated_fields(self) -> dict[str, Any]:
        width = self.language_model.width
        return dict(
            width=width,
            heads=self.heads,
            head_size=self.head_size,
            media_width=self.resampler.width,
            spec=self.gated_spec,
            dtype=self.dtype,
        )

    def __call__(self, batch: Mapping[str, Array]) -> Array:
        media = self.see(batch["media"], batch["frame_mask"])
        text_mask = batch["text_mask"]
        x = self.read(
            self.embed(batch["text"]), positions(text_mask), causal_mask(text_mask), media, batch["media_mask"]
        )
        return self.logits(x)

    def see(self, media_BxTxFxSxSx3: Array, frame_mask_BxTxF: Array) -> Array:
        """The images as tokens for the language model, R for each. [B, T·R, C]."""
        B, T, F, *image = media_BxTxFxSxSx3.shape
        _, tokens = self.vision(media_BxTxFxSxSx3.reshape(B * T * F, *image))
        if not self.class_token:
            tokens = tokens[:, self.vision.num_prefix_tokens :]
        features = tokens.reshape(B * T, F, *tokens.shape[1:])
        latents = self.resampler(features, frame_mask_BxTxF.reshape(B * T, F))
        return latents.reshape(B, T * latents.shape[1], latents.shape[2])

    def embed(self, text_BxL: Array) -> Array:
        V = self.language_model.vocab_size
        known = self.language_model.embed(jnp.minimum(text_BxL, V - 1))
        extra = self.extra_embedding_ExD.astype(self.dtype)[jnp.maximum(text_BxL - V, 0)]
        return jnp.where(text_BxL[..., None] < V, known, extra)

    def logits(self, x_BxLxD: Array) -> Array:
        """The language model's own logits, then those of the extra tokens."""
        known, normed = self.language_model.logits(x_BxLxD)
        extra = jnp.einsum(
            "BLD,ED->BLE", normed, self.extra_head_ExD.astype(self.dtype), preferred_element_type=known.dtype
        )
        return jnp.concatenate([known, extra], axis=-1)

    def keys_values(self, media_BxSxC: Array) -> tuple[KeyValue, ...]:
        """Keys and values [B, H, S, K] of every gated block: what decoding computes once."""
        block, gated = GatedCrossAttention(**self._gated_fields(), parent=None), self.variables["params"]["gated"]
        return tuple(
            block.apply({"params": layer(gated, i)}, media_BxSxC, method=block.keys_values)
            for i in range(self.gated_blocks)
        )

    @property
    def gated_blocks(self) -> int:
        return -(-(self.language_model.layers - self.first_block) // self.interval)

    def read(
        self, x_BxLxD: Array, position_BxL: Array, mask_BxLxS: Array, media_BxMxC: Array, media_mask_BxLxT: Array
    ) -> Array:
        """The language model's blocks with the gated ones between; `media` is what `see` returned."""
        seen = jnp.repeat(media_mask_BxLxT, self.resampler.latents, axis=2)
        x_BxLxD = self.language_model.place(x_BxLxD, position_BxL, mask_BxLxS.shape[-1])
        if self.is_initializing():
            x, _ = self.gated(x_BxLxD, media_BxMxC, seen)
            return self.language_model.blocks(x, position_BxL, mask_BxLxS)[0]

        gated_block = GatedCrossAttention(**self._gated_fields(), parent=None)
        block, n = self.language_model.block(), self.interval

        def group(x: Array, inputs: Any) -> tuple[Array, None]:
            """A gated block and the n blocks of the language model that it stands before."""
            gated, blocks = inputs
            x, _ = gated_block.apply({"params": gated}, x, media_BxMxC, seen)
            return run_blocks(block, blocks, x, position_BxL, mask_BxLxS), None

        gated, blocks = self.variables["params"]["gated"], self.language_model.variables["params"]["blocks"]
        f = self.first_block
        whole = (self.language_model.layers - f) // n
        end = f + whole * n

        def cut(tree: Any, *where: int | None) -> Any:
            return jax.tree.map(lambda x: x[slice(*where)], tree)

        x = x_BxLxD
        if f:
            x = run_blocks(block, cut(blocks, f), x, position_BxL, mask_BxLxS)
        step = jax.checkpoint(group) if self.remat else group
        groups = jax.tree.map(lambda x: x[f:end].reshape(whole, n, *x.shape[1:]), blocks)
        x, _ = jax.lax.scan(step, x, (cut(gated, whole), groups))
        if end < self.language_model.layers:  # the last group is shorter
            x, _ = step(x, (layer(gated, whole), cut(blocks, end, None)))
        return x

    def read_cached(
        self, x_QxLxD: Array, position_QxL: Array, mask_QxLxS: Array, media: Sequence[KeyValue],
        media_mask_QxLxT: Array, cache: Sequence[KeyValue] | None, start: Any, slots: int,
    ) -> tuple[Array, tuple[KeyValue, ...]]:  # fmt: skip
        """`read` for decoding: (x, keys and values of every block's self-attention), into slots from `start` on.

        Q = B·n rows: n at a time share the images of one of the B rows whose keys and values `media` are (see
        `keys_values`). Without a cache, S = L and nothing came before. Rows have `slots` places in the end.

        Block by block, not a scan: each one's weights are read where they lie, and its keys and values are updated
        in place. A scan copies both.
        """
        seen = jnp.repeat(media_mask_QxLxT, self.resampler.latents, axis=2)
        x = self.language_model.place(x_QxLxD, position_QxL, slots)
        gated_block = GatedCrossAttention(**self._gated_fields(), parent=None)
        block, kept = self.language_model.block(), []
        gated, blocks = self.variables["params"]["gated"], self.language_model.variables["params"]["blocks"]
        for i in range(self.language_model.layers):
            g, after = divmod(i - self.first_block, self.interval)
            if g >= 0 and not after:
                B = media[g][0].shape[0]
                shared, mask = x.reshape(B, -1, x.shape[-1]), seen.reshape(B, -1, seen.shape[-1])
                x = gated_block.apply({"params": layer(gated, g)}, shared, media[g], mask)[0].reshape(x.shape)
            x, key_value = block.apply(
                {"params": layer(blocks, i)}, x, position_QxL, mask_QxLxS, cache[i] if cache else None, start
            )
            kept.append(key_value)
        return x, tuple(kept)


def layer(blocks: Any, i: int) -> Any:
    """The parameters of one block: of a tuple, or of stacked ones."""
    return blocks[i] if isinstance(blocks, tuple) else jax.tree.map(lambda x: x[i], blocks)
