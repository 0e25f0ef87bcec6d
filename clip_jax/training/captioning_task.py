"""Predicting an image's text, token by token: a baseline of CLIP's figure 2 (arXiv 2103.00020 §2.3)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from clip_jax.errors import ConfigError
from clip_jax.losses.next_token import caption_losses
from clip_jax.models.variants import build_captioner
from clip_jax.training.pair_task import Batch, LabelTask

PyTree = Any


class CaptioningTask(LabelTask):
    """The mean loss of a caption's tokens, the end token among them, over a batch; like VirTex (arXiv 2006.06666),
    but in one direction.

    A label's score is its log likelihood as the image's whole caption.
    """

    family = "captioning"

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        super().__init__(config, mesh, build_captioner(config.model))
        if self.tokenizer.start_id is None:
            raise ConfigError(f"{config.data.tokenizer} has no start token: expected one, for captions to begin with")
        self.values_per_token = config.model.text.vocab_size

    def loss(
        self, trainable: PyTree, frozen: PyTree, state: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
        def losses(output: tuple[jax.Array, jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
            return caption_losses(output[0], batch["text"], self.tokenizer.end_id)

        (losses_B, tokens_B), state = self.outputs(trainable, frozen, state, batch, rng, losses)
        return losses_B.sum() / tokens_B.sum(), ({}, state)

    def rows(self, variables: PyTree, images: Mapping[str, jax.Array]) -> jax.Array:
        return self.model.apply(variables, images)[1]

    def scores(self, variables: PyTree, rows: jax.Array, ids: jax.Array) -> jax.Array:
        text_GxL = jnp.tile(ids, (len(rows), 1))  # every label for the first image, then for the second
        logits_GxLxV, _ = self.model.apply(variables, {"image_tokens": rows, "text": text_GxL})
        return -caption_losses(logits_GxLxV, text_GxL, self.tokenizer.end_id)[0].reshape(len(rows), len(ids))
