"""Predicting the words of a text from its image: a baseline of CLIP's figure 2 (arXiv 2103.00020 §2.3)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from clip_jax.losses.bag_of_words import bag_of_words_losses
from clip_jax.models.variants import build_bag_of_words
from clip_jax.training.pair_task import Batch, LabelTask

PyTree = Any


class BagOfWordsTask(LabelTask):
    """The multi-class logistic loss of a text's words (Joulin et al., arXiv 1511.02251 §3): `bag_of_words_losses`.

    A word is an id of the tokenizer, which for frequent words is the word: the vocabulary is that of the other
    objectives, and no label is without words. A label's score is the mean of its words' log probabilities.
    """

    family = "bag_of_words"
    values_per_token = 1

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        super().__init__(config, mesh, build_bag_of_words(config.model))

    def loss(
        self, trainable: PyTree, frozen: PyTree, state: PyTree, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
        def losses(logits: jax.Array, batch: Batch) -> jax.Array:
            return self._losses(logits, batch["text"])

        losses_B, state = self.outputs(trainable, frozen, state, batch, rng, losses)
        return losses_B.mean(), ({}, state)

    def rows(self, variables: PyTree, images: Mapping[str, jax.Array]) -> jax.Array:
        return self.model.apply(variables, images)

    def scores(self, variables: PyTree, rows: jax.Array, ids: jax.Array) -> jax.Array:
        def of_one(ids_L: jax.Array) -> jax.Array:
            return -self._losses(rows, jnp.broadcast_to(ids_L, (len(rows), *ids_L.shape)))

        return jax.vmap(of_one, out_axes=1)(ids)

    def _losses(self, logits: jax.Array, text: jax.Array) -> jax.Array:
        return bag_of_words_losses(logits, text, self.tokenizer.start_id, self.tokenizer.end_id)
