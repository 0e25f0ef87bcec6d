"""CLIP as a task: two towers, the contrastive loss, zero-shot classification and retrieval."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data import transforms
from clip_jax.data.order import Order, group_by
from clip_jax.data.pipeline import Draws, PairElements, Stream
from clip_jax.data.sources import open_source, texts_of
from clip_jax.data.tokenizer import load_tokenizer
from clip_jax.errors import ConfigError
from clip_jax.evaluation.pairs import Encoder, evaluate_source
from clip_jax.losses import contrastive_loss, sigmoid_loss
from clip_jax.models.variants import build_two_tower
from clip_jax.training.micro_batches import in_micro_batches
from clip_jax.training.state import merge

PyTree = Any


class ClipTask:
    """Contrastive learning on image–text pairs.

    Raises ConfigError where the tokenizer does not fit the text tower, DataError where data are missing.
    """

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        self.config, self.mesh = config, mesh
        check_loss(config)
        self.model = build_two_tower(config.model)
        if (
            config.loss == "sigmoid" and "init_logit_bias" not in config.model
        ):  # starts where SigLIP's does (arXiv 2303.15343 §3.2)
            self.model = self.model.clone(init_logit_scale=math.log(10), init_logit_bias=-10.0)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        text = config.model.text
        end_id = text.get("end_id", self.tokenizer.end_id)  # a tower that pools at the last place has none
        if (self.tokenizer.vocab_size, self.tokenizer.end_id) != (text.vocab_size, end_id):
            raise ConfigError(
                f"{config.data.tokenizer} has {self.tokenizer.vocab_size} ids and end id {self.tokenizer.end_id}; "
                f"model.text expects {text.vocab_size} and {end_id}"
            )
        source = open_source(config.data.train)
        groups = group_by(texts_of(source)) if config.data.group_by_text else None
        self.elements = PairElements(
            Draws(source, Order(len(source), config.seed, groups), {} if config.data.cache else None),
            tokenizer=self.tokenizer,
            image_size=config.model.vision.image_size,
            context_length=text.context_length,
            augment=transforms.Augmentation(**config.data.augment),
            keyword_rate=config.data.keyword_rate,
        )

    def streams(self) -> Mapping[str, Stream]:
        return {"pairs": Stream(self.elements, self.config.batch_size)}

    def init(self, rng: jax.Array) -> tuple[PyTree, PyTree]:
        size = self.config.model.vision.image_size
        batch = {
            "image": jnp.zeros((1, size, size, 3), jnp.float32),
            "text": jnp.zeros((1, self.config.model.text.context_length), jnp.int32),
        }
        variables = dict(self.model.init(rng, batch))
        params = variables.pop("params")
        return params, variables

    def abstract_variables(self) -> tuple[PyTree, PyTree]:
        """(params, state) as shapes with their shardings on the task's mesh; nothing is allocated."""
        boxed = jax.eval_shape(self.init, jax.random.key(0))
        rules = sharding.rules_of(self.config.sharding_rules)
        params, state = sharding.abstract(boxed, self.mesh, rules)
        return params, state

    def sources(self) -> Mapping[str, str]:
        return {name: path for name, path in self.config.init.items() if path}

    def loss(
        self, trainable: PyTree, frozen: PyTree, state: PyTree, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
        variables = {"params": merge(trainable, frozen), **state}

        def embed(batch: Mapping[str, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], PyTree]:
            inputs = {"image": self._normalize(batch["image"]), "text": batch["text"]}
            (image, text, _), new_state = self.model.apply(
                variables, inputs, train=True, mutable=list(state), rngs={"dropout": rng}
            )
            return (image, text), new_state

        if self.config.micro_batches == 1:
            (image, text), state = embed(batch)
        else:  # only towers without a state come here
            examples = {key: batch[key] for key in ("image", "text")}
            image, text = in_micro_batches(lambda b: embed(b)[0], examples, self.config.micro_batches, self.mesh)
        _, _, scalars = self.model.apply(variables, {})  # logit_scale, logit_bias
        over: dict[str, Any] = dict(mesh=self.mesh, axis_names=sharding.BATCH_AXES)
        if self.config.loss == "sigmoid":
            loss = sigmoid_loss(image, text, **scalars, **over)
        else:
            loss = contrastive_loss(image, text, **scalars, **over, label_smoothing=self.config.label_smoothing)
        return loss, (scalars, state)

    def evaluate(self, params: PyTree, state: PyTree, mesh: Mesh) -> dict[str, float]:
        """The headline figures of each split named in `config.data.evaluate`."""
        encoder = self.encoder(params, state, mesh)
        results: dict[str, float] = {}
        for name, spec in self.config.data.evaluate.items():
            found = evaluate_source(encoder, open_source(spec), self.config.data.templates).figures
            results |= {f"{name}.{key}": found[key] for key in ("top1", "top5", "recall_at_5")}
        return results

    def encoder(self, params: PyTree, state: PyTree, mesh: Mesh) -> Encoder:
        """Embeds images and texts in batches over the mesh."""

        def encode(params: PyTree, state: PyTree, batch: Mapping[str, jax.Array]) -> jax.Array:
            inputs = {k: self._normalize(v) if k == "image" else v for k, v in batch.items()}
            image, text, _ = self.model.apply({"params": params, **state}, inputs)
            embedding = text if image is None else image
            return embedding

        return Encoder(
            function=jax.jit(encode, out_shardings=sharding.replicated(mesh)),
            params=params,
            state=state,
            mesh=mesh,
            image_size=self.config.model.vision.image_size,
            tokenize=lambda texts: self.tokenizer(texts, self.config.model.text.context_length),
            batch_size=max(self.config.evaluation_batch_size, sharding.batch_shards(mesh)),
        )

    def metadata(self) -> dict[str, Any]:
        model = self.config.model
        return {
            "family": "clip",
            "towers": {"vision": model.vision.to_dict(), "text": model.text.to_dict()},
            "embed_dim": model.embed_dim,
            "activation": model.activation,
            "tokenizer": {"file": Path(self.config.data.tokenizer).name, "sha256": self.tokenizer.digest()},
            "preprocess": {
                "image_size": model.vision.image_size,
                "resize": "shorter side, bicubic, centre crop",
                "mean": list(self.config.data.mean),
                "std": list(self.config.data.std),
            },
        }

    def _normalize(self, image: jax.Array) -> jax.Array:
        return transforms.normalize(image, self.config.data.mean, self.config.data.std)


def check_loss(config: ml_collections.ConfigDict) -> None:
    """Raises ConfigError where `loss`, `label_smoothing` or `micro_batches` cannot be."""
    if config.loss not in ("softmax", "sigmoid"):
        raise ConfigError(f"loss {config.loss!r}: expected softmax or sigmoid")
    if not 0 <= config.label_smoothing < 1 or (config.label_smoothing and config.loss != "softmax"):
        raise ConfigError(
            f"label_smoothing {config.label_smoothing:g} with loss {config.loss}: expected 0 ≤ label_smoothing < 1, "
            "and 0 unless loss is softmax"
        )
    if config.micro_batches > 1 and config.model.vision.get("patch_dropout"):
        raise ConfigError(
            f"micro_batches {config.micro_batches} with patch_dropout {config.model.vision.patch_dropout:g}: every "
            "micro-batch would lose the same patches; expected micro_batches 1 or patch_dropout 0"
        )
    if config.micro_batches > 1 and config.model.vision.kind == "resnet":
        raise ConfigError(
            f"micro_batches {config.micro_batches} with a ResNet: BatchNorm statistics would be those of a "
            "micro-batch; expected micro_batches 1 or a ViT"
        )
