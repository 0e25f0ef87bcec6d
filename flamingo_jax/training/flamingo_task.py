"""Flamingo as a task: a frozen tower and a frozen language model from checkpoints, the parts between them trained."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data import transforms
from clip_jax.data.pipeline import Stream
from clip_jax.data.sources import open_source
from clip_jax.errors import ConfigError
from clip_jax.losses.next_token import next_token_losses
from clip_jax.training import checkpoint
from clip_jax.training.starting_points import COSTS, check_vision, compare
from clip_jax.training.state import matches_any, merge, partition
from flamingo_jax.data.documents import Shape
from flamingo_jax.data.emoji import EmojiDocuments, catalogue
from flamingo_jax.data.tokenizer import open_tokenizer
from flamingo_jax.models.variants import build_flamingo, language_model_fields, resampler_fields
from flamingo_jax.training.language_model_task import check_vocabulary

PyTree = Any
REQUIRED = ("vision", "language_model")  # of config.init


class FlamingoTask:
    """Next-token prediction on documents with images: a mixture of pages, pairs and clips.

    Raises ConfigError where the tokenizer does not fit the language model, DataError where data are missing.
    """

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model = build_flamingo(config.model)
        self.tokenizer = open_tokenizer(config.data.tokenizer, config.data.bos)
        vocab_size = config.model.language_model.vocab_size
        check_vocabulary(self.tokenizer, config.data.tokenizer, vocab_size)
        self.end_id = vocab_size  # the first id beyond the language model's: <EOC>
        self.image_size = config.model.vision.image_size

    def shape(self, images: int, tokens: int) -> Shape:
        """The shape of documents of so many images and tokens."""
        return Shape(images, self.config.model.resampler.frames, self.image_size, tokens)

    def streams(self) -> Mapping[str, Stream]:
        return self._streams

    @cached_property
    def _streams(self) -> dict[str, Stream]:
        data = self.config.data
        source = open_source(data.train)
        listing = catalogue(source, self.image_size)  # decodes every picture, once for all streams
        return {
            name: Stream(
                EmojiDocuments(
                    kind=name,
                    source=source,
                    seed=self.config.seed + number,
                    tokenizer=self.tokenizer,
                    shape=Shape(part.images, part.frames, self.image_size, part.tokens),
                    end_id=self.end_id,
                    augment=transforms.Augmentation(**data.augment),
                    next_rate=data.next_rate,
                    listing=listing,
                ),
                part.batch_size,
                part.weight,
            )
            for number, (name, part) in enumerate(data.mixture.items())
        }

    def init(self, rng: jax.Array) -> tuple[PyTree, PyTree]:
        R, S = self.config.model.resampler.frames, self.image_size
        batch = {
            "media": jnp.zeros((1, 1, R, S, S, 3), jnp.float32),
            "frame_mask": jnp.ones((1, 1, R), bool),
            "text": jnp.zeros((1, 2), jnp.int32),
            "text_mask": jnp.ones((1, 2), bool),
            "media_mask": jnp.ones((1, 2, 1), bool),
        }
        variables = dict(self.model.init(rng, batch))
        return self.cast_frozen(variables.pop("params")), variables

    def cast_frozen(self, params: PyTree) -> PyTree:
        """Parameters, of which the frozen ones are in `config.frozen_dtype`."""
        trained, frozen = partition(params, matches_any(self.config.frozen))
        dtype = self.config.get("frozen_dtype", "float32")
        return merge(trained, jax.tree.map(lambda x: x.astype(dtype), frozen))

    def sources(self) -> Mapping[str, str]:
        """Where the tower, the language model and perhaps the resampler come from.

        What their checkpoints say of themselves is compared with the config first.
        """
        model = self.config.model
        init = {name: path for name, path in self.config.init.items() if path or name in REQUIRED}
        found = {}
        for name, path in init.items():
            if not path:
                raise ConfigError(f"init.{name} is empty: name the run or checkpoint that it is taken from")
            found[name] = checkpoint.metadata(checkpoint.latest(Path(path))).get("model", {})
        clip, lm = found["vision"], found["language_model"]
        flamingo = found.get("resampler", {}).get("flamingo", {})
        for name, there, what in (
            ("vision", "vision" in clip.get("towers", {}), "tower `vision`"),
            ("language_model", "language_model" in lm, "language model"),
            ("resampler", "resampler" in flamingo, "resampler"),
        ):
            if name in init and not there:
                family = found[name].get("family", "foreign")
                raise ConfigError(f"init.{name}={self.config.init[name]}: a {family} checkpoint, without a {what}")
        check_vision(self.config)
        # A checkpoint may be older than a field, or name only what its source says.
        fields = language_model_fields(lm["language_model"])
        compare("init.language_model", fields, model.language_model.to_dict(), ("embedding_std",))
        digests = {"tokenizer.sha256": self.tokenizer.digest()}
        compare("init.language_model", {"tokenizer.sha256": lm["tokenizer"]["sha256"]}, digests)
        if flamingo:
            compare("init.resampler", resampler_fields(flamingo["resampler"]), model.resampler.to_dict())
            theirs, ours = ({"norm_tokens": False, **eye} for eye in (flamingo["vision"], model.vision.to_dict()))
            compare("init.resampler", theirs, ours, tuple(key for key in COSTS if key != "norm_tokens"))
        return init

    def loss(
        self, trainable: PyTree, frozen: PyTree, state: PyTree, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
        losses, mask = self.token_losses({"params": merge(trainable, frozen), **state}, batch)
        gates = [trainable["gated"][name] for name in ("attention_gate", "mlp_gate") if name in trainable["gated"]]
        metrics = {"gate": jnp.abs(jnp.tanh(jnp.concatenate(gates))).mean()} if gates else {}
        return (losses * mask).sum() / jnp.maximum(mask.sum(), 1), (metrics, state)

    def token_losses(self, variables: PyTree, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """(losses, mask of those that count), [B, L - 1] each."""
        logits = self.model.apply(variables, self.inputs(batch))
        return next_token_losses(logits, batch["text"]), batch["loss_mask"][:, 1:].astype(logits.dtype)

    def inputs(self, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """A batch as the model takes it: uint8 images normalised, on the device."""
        media = transforms.normalize(batch["media"], self.config.data.mean, self.config.data.std)
        return {**batch, "media": media}

    def abstract_variables(self) -> tuple[PyTree, PyTree]:
        """(params, state) as shapes with their shardings on the task's mesh; nothing is allocated."""
        boxed = jax.eval_shape(self.init, jax.random.key(0))
        params, state = sharding.abstract(boxed, self.mesh, sharding.rules_of(self.config.sharding_rules))
        return params, state

    def evaluate(self, params: PyTree, state: PyTree, mesh: Mesh) -> dict[str, float]:
        """Answers and losses on held-out pictures, with the right images, with shuffled ones and with none.

        On `config.evaluation.quick` questions of each task; nothing where that is 0.
        """
        from flamingo_jax.evaluation.few_shot import evaluate

        quick = self.config.evaluation.quick
        if not quick:
            return {}
        return evaluate(self, params, state, mesh, quick, quick).headline()

    def metadata(self) -> dict[str, Any]:
        model = self.config.model
        return {
            "family": "flamingo",
            "flamingo": model.to_dict(),
            "tokenizer": {"file": Path(self.config.data.tokenizer).name, "sha256": self.tokenizer.digest()},
            "preprocess": {
                "image_size": self.image_size,
                "mean": list(self.config.data.mean),
                "std": list(self.config.data.std),
            },
        }
