"""Flamingo (arXiv 2204.14198 §2): a frozen vision tower and a frozen language model, joined by a resampler and by
gated cross-attention before the language model's blocks 0, n, 2n, … OpenFlamingo and IDEFICS are the same model
with other fields, and so are the paper's ablations (table 3; what they are says v1, §4.4.2). Dimension letters: see
`layers.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import RESIDUAL, Array, normal
from clip_jax.sharding import examples_everywhere
from flamingo_jax.models.gated_attention import GatedCrossAttention, GatedSpec
from flamingo_jax.models.language_model import Block, KeyValue, LanguageModel, causal_mask, positions, run_blocks
from flamingo_jax.models.resampler import Resampler

CROSS_ATTENTION = ("gated_dense", "vanilla", "grafted")


class Flamingo(nn.Module):
    """Batch → logits [B, L, V + extra_tokens], float32.

    A batch holds `media` [B, T, F, S, S, 3] (T images or clips of F frames, normalised), `frame_mask` [B, T, F],
    `text` [B, L], `text_mask` [B, L] and `media_mask` [B, L, T]: which images a token attends; or, instead of `media`,
    what `look` makes of it, `features` [B, T, F, N, C]. The model makes
    none of these masks itself. Ids from the language model's vocabulary size on are the extra tokens, trained.
    Gated blocks stand before blocks f, f + n, f + 2n, … (f `first_block`, n `interval`).

    `cross_attention`: "gated_dense"; or "vanilla", as in the first Transformer's decoder: within those blocks,
    between their self-attention and their feed-forward, with a gate but without a feed-forward of its own; or
    "grafted": the language model's blocks are left alone, and as many new ones follow them, trained from scratch,
    each a self-attention block like the language model's own and then a gated one. Its last norm and its head,
    frozen, read the result.

    Raises ConfigError for another `cross_attention`, and for "vanilla" in blocks with a parallel residual.
    """

    vision: nn.Module
    resampler: Resampler
    language_model: LanguageModel
    interval: int
    heads: int
    head_size: int
    gated_spec: GatedSpec = GatedSpec()
    first_block: int = 0
    cross_attention: str = "gated_dense"
    class_token: bool = True  # whether the resampler looks at the tower's class token, where it has one
    extra_tokens: int = 1
    remat: bool = False
    dtype: Any = jnp.float32

    def setup(self) -> None:
        width = self.language_model.width
        if self.cross_attention not in CROSS_ATTENTION:
            raise ConfigError(
                f"cross_attention is {self.cross_attention!r}; expected one of {', '.join(CROSS_ATTENTION)}"
            )
        if self.cross_attention == "vanilla" and self.language_model.spec.parallel_residual:
            raise ConfigError(
                "cross_attention is 'vanilla', but this language model's self-attention and feed-forward are parallel: "
                "nothing stands between them"
            )

        def stacked(module: Any) -> Any:
            return nn.scan(
                module,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                length=self.gated_blocks,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )

        self.gated = stacked(GatedCrossAttention)(**self._gated_fields())
        if self.cross_attention == "grafted":
            self.grafted = stacked(Block)(self.language_model.spec, self.dtype)
        self.extra_embedding_ExD = self.param(
            "extra_embedding", normal(0.02, None, "embed"), (self.extra_tokens, width)
        )
        self.extra_head_ExD = self.param("extra_head", normal(0.02, None, "embed"), (self.extra_tokens, width))

    @property
    def gated_blocks(self) -> int:
        return -(-(self.language_model.layers - self.first_block) // self.interval)

    def _gated_fields(self) -> dict[str, Any]:
        width = self.language_model.width
        return dict(
            width=width,
            heads=self.heads,
            head_size=self.head_size,
            media_width=self.resampler.width,
            spec=self.gated_spec,
            dense=self.cross_attention != "vanilla",
            dtype=self.dtype,
        )

    def __call__(self, batch: Mapping[str, Array]) -> Array:
        media = self.see(batch)
        text_mask = batch["text_mask"]
        media_mask = self.image_mask(batch["media_mask"], batch["frame_mask"])
        x = self.read(self.embed(batch["text"]), positions(text_mask), causal_mask(text_mask), media, media_mask)
        return self.logits(x)

    @nn.nowrap
    def image_mask(self, media_mask_BxLxT: Array, frame_mask_BxTxF: Array) -> Array:
        """The `media_mask` that `read` expects: where there are no latents, [B, L, T·F], False for padded frames."""
        if self.resampler.has_latents:
            return media_mask_BxLxT
        seen_BxLxTxF = media_mask_BxLxT[..., None] & frame_mask_BxTxF[:, None]
        return seen_BxLxTxF.reshape(*seen_BxLxTxF.shape[:2], -1)

    def see(self, batch: Mapping[str, Array]) -> Array:
        """A batch's images as tokens for the language model, R for each (F·N without latents). [B, T·R, C]."""
        features = batch["features"] if "features" in batch else self.look(batch["media"])
        return self.resample(features, batch["frame_mask"])

    def look(self, media_BxTxFxSxSx3: Array) -> Array:
        """What the frozen tower makes of the images, N tokens a frame. [B, T, F, N, C]."""
        B, T, F, *image = media_BxTxFxSxSx3.shape
        with examples_everywhere(B * T):
            images = nn.with_logical_constraint(media_BxTxFxSxSx3.reshape(B * T * F, *image), ("batch",))
            _, tokens = self.vision(images)
            if not self.class_token:
                tokens = tokens[:, self.vision.num_prefix_tokens :]
            return tokens.reshape(B, T, F, *tokens.shape[1:])

    def resample(self, features_BxTxFxNxC: Array, frame_mask_BxTxF: Array) -> Array:
        """The images as tokens for the language model, from `look`'s. [B, T·R, C]."""
        B, T, F, N, C = features_BxTxFxNxC.shape
        with examples_everywhere(B * T):
            latents = self.resampler(features_BxTxFxNxC.reshape(B * T, F, N, C), frame_mask_BxTxF.reshape(B * T, F))
        return nn.with_logical_constraint(latents.reshape(B, T * latents.shape[1], latents.shape[2]), RESIDUAL)

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

    def read(
        self, x_BxLxD: Array, position_BxL: Array, mask_BxLxS: Array, media_BxMxC: Array, media_mask_BxLxT: Array
    ) -> Array:
        """The language model's blocks with the gated ones; `media` is what `see` returned, the mask `image_mask`'s."""
        seen = token_mask(media_mask_BxLxT, media_BxMxC.shape[1])
        x = self.language_model.place(x_BxLxD, position_BxL, mask_BxLxS.shape[-1])
        if self.is_initializing():
            x, _ = self.gated(x, media_BxMxC, seen)
            x, _ = self.language_model.blocks(x, position_BxL, mask_BxLxS)
            return self.grafted(x, position_BxL, mask_BxLxS)[0] if self.cross_attention == "grafted" else x

        gated_block = GatedCrossAttention(**self._gated_fields(), parent=None)
        block, n = self.language_model.block(), self.interval
        gated, blocks = self.variables["params"]["gated"], self.language_model.variables["params"]["blocks"]

        def cut(tree: Any, *where: int | None) -> Any:
            return jax.tree.map(lambda x: x[slice(*where)], tree)

        def attend(x: Array, params: Any) -> Array:
            return gated_block.apply({"params": params}, x, media_BxMxC, seen)[0]

        def group(x: Array, inputs: Any) -> tuple[Array, None]:
            """A gated block and the n blocks of the language model before, or in, the first of which it stands."""
            gated, blocks = inputs
            if self.cross_attention != "vanilla":
                return run_blocks(block, blocks, attend(x, gated), position_BxL, mask_BxLxS), None
            first = {"params": layer(blocks, 0)}
            x, _ = block.apply(first, x, position_BxL, mask_BxLxS, between=lambda x: attend(x, gated))
            return run_blocks(block, cut(blocks, 1, None), x, position_BxL, mask_BxLxS), None

        def pair(x: Array, inputs: Any) -> tuple[Array, None]:
            """A grafted self-attention block and the gated one after it."""
            gated, grafted = inputs
            return attend(block.apply({"params": grafted}, x, position_BxL, mask_BxLxS)[0], gated), None

        step = pair if self.cross_attention == "grafted" else group
        step = jax.checkpoint(step) if self.remat else step
        if self.cross_attention == "grafted":
            x = run_blocks(block, blocks, x, position_BxL, mask_BxLxS)
            return jax.lax.scan(step, x, (gated, self.variables["params"]["grafted"]))[0]

        f = self.first_block
        whole = (self.language_model.layers - f) // n
        end = f + whole * n
        if f:
            x = run_blocks(block, cut(blocks, f), x, position_BxL, mask_BxLxS)
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
        seen = token_mask(media_mask_QxLxT, media[0][0].shape[2])
        x = self.language_model.place(x_QxLxD, position_QxL, slots)
        gated_block = GatedCrossAttention(**self._gated_fields(), parent=None)
        block = self.language_model.block()
        gated, blocks = self.variables["params"]["gated"], self.language_model.variables["params"]["blocks"]
        kept: list[KeyValue] = []

        def attend(x: Array, g: int) -> Array:
            B = media[g][0].shape[0]
            shared, mask = x.reshape(B, -1, x.shape[-1]), seen.reshape(B, -1, seen.shape[-1])
            return gated_block.apply({"params": layer(gated, g)}, shared, media[g], mask)[0].reshape(x.shape)

        def attend_self(x: Array, params: Any, between: Callable[[Array], Array] = lambda x: x) -> Array:
            known = cache[len(kept)] if cache else None
            x, key_value = block.apply({"params": params}, x, position_QxL, mask_QxLxS, known, start, between)
            kept.append(key_value)
            return x

        for i in range(self.language_model.layers):
            g, after = divmod(i - self.first_block, self.interval)
            here = g >= 0 and not after and self.cross_attention != "grafted"
            if here and self.cross_attention == "vanilla":
                x = attend_self(x, layer(blocks, i), partial(attend, g=g))
            else:
                x = attend_self(attend(x, g) if here else x, layer(blocks, i))
        if self.cross_attention == "grafted":
            for g in range(self.gated_blocks):
                x = attend(attend_self(x, layer(self.variables["params"]["grafted"], g)), g)
        return x, tuple(kept)


def layer(blocks: Any, i: int) -> Any:
    """The parameters of one block: of a tuple, or of stacked ones."""
    return blocks[i] if isinstance(blocks, tuple) else jax.tree.map(lambda x: x[i], blocks)


def token_mask(media_mask_BxLxT: Array, tokens: int) -> Array:
    """Of images, each as many of the `tokens` → of these. [B, L, tokens]."""
    return jnp.repeat(media_mask_BxLxT, tokens // max(media_mask_BxLxT.shape[2], 1), axis=2)
