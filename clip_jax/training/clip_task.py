"""CLIP as a task: two towers, the contrastive loss, zero-shot classification and retrieval."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data.sources import PairSource
from clip_jax.errors import ConfigError
from clip_jax.evaluation.encoder import Encoder, nothing
from clip_jax.evaluation.pairs import Evaluation, evaluate_source
from clip_jax.losses import contrastive_loss, sigmoid_loss
from clip_jax.models.variants import build_two_tower
from clip_jax.training.pair_task import PairTask
from clip_jax.training.state import merge

PyTree = Any


class ClipTask(PairTask):
    """Contrastive learning on image–text pairs."""

    family = "clip"

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        check_loss(config)
        model = build_two_tower(config.model)
        if (
            config.loss == "sigmoid" and "init_logit_bias" not in config.model
        ):  # starts where SigLIP's does (arXiv 2303.15343 §3.2)
            model = model.clone(init_logit_scale=math.log(10), init_logit_bias=-10.0)
        super().__init__(config, mesh, model)

    def loss(
        self, trainable: PyTree, frozen: PyTree, state: PyTree, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
        (image, text), state = self.outputs(trainable, frozen, state, batch, rng, lambda output, _: output[:2])
        variables = {"params": merge(trainable, frozen), **state}
        _, _, scalars = self.model.apply(variables, {})  # logit_scale, logit_bias
        over: dict[str, Any] = dict(mesh=self.mesh, axis_names=sharding.BATCH_AXES)
        if self.config.loss == "sigmoid":
            loss = sigmoid_loss(image, text, **scalars, **over)
        else:
            loss = contrastive_loss(image, text, **scalars, **over, label_smoothing=self.config.label_smoothing)
        return loss, (scalars, state)

    def evaluator(
        self, params: PyTree, state: PyTree, mesh: Mesh, between: Callable[[], None] = nothing
    ) -> Callable[[PairSource], Evaluation]:
        encoder = self.encoder(params, state, mesh, between)
        return partial(evaluate_source, encoder, templates=self.config.data.templates)

    def encoder(self, params: PyTree, state: PyTree, mesh: Mesh, between: Callable[[], None] = nothing) -> Encoder:
        """Embeds images and texts in batches over the mesh."""

        def encode(params: PyTree, state: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
            inputs = {k: self.normalize(v) if k == "image" else v for k, v in batch.items()}
            image, text, _ = self.model.apply({"params": params, **state}, inputs)
            embedding = text if image is None else image
            return embedding

        return self.encoder_of(encode, params, state, mesh, between)

    def metadata(self) -> dict[str, Any]:
        found = super().metadata()
        found["towers"]["text"] = self.config.model.text.to_dict()
        return found


def check_loss(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where `loss` or `label_smoothing` cannot be."""
    if config.loss not in ("softmax", "sigmoid"):
        raise ConfigError(f"loss {config.loss!r}: expected softmax or sigmoid")
    if not 0 <= config.label_smoothing < 1 or (config.label_smoothing and config.loss != "softmax"):
        raise ConfigError(
            f"label_smoothing {config.label_smoothing:g} with loss {config.loss}: expected 0 ≤ label_smoothing < 1, "
            "and 0 unless loss is softmax"
        )
