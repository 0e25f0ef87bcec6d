"""A language model as a task: the next token of plain texts. What Flamingo freezes, where nothing better is at hand."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data.order import Order
from clip_jax.data.pipeline import Element, Stream
from clip_jax.errors import ConfigError
from clip_jax.losses.next_token import next_token_losses
from clip_jax.models.layers import Array
from clip_jax.training.state import merge
from flamingo_jax.data.text import TextSource, open_texts
from flamingo_jax.data.tokenizer import TextTokenizer, check_vocabulary, open_tokenizer
from flamingo_jax.models.language_model import LanguageModel
from flamingo_jax.models.variants import build_language_model

PyTree = Any


class TextOnly(nn.Module):
    """The language model under the name that it has in Flamingo."""

    language_model: LanguageModel

    @nn.compact
    def __call__(self, text_BxL: Array) -> Array:
        return self.language_model(text_BxL)


@dataclass(frozen=True)
class Windows:
    """Windows of L tokens of all texts in a row, each text after a `bos`. Element: text int32 [L]."""

    texts: Sequence[TextSource]
    tokenizer: TextTokenizer
    length: int
    seed: int
    tokens: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ids = self.tokenizer.encode_many(texts[i] for texts in self.texts for i in range(len(texts)))
        joined = np.concatenate([np.array([self.tokenizer.bos_id, *row], np.int32) for row in ids])
        if len(joined) < self.length:
            raise ConfigError(f"texts of {len(joined)} tokens: at least one window of {self.length} expected")
        object.__setattr__(self, "tokens", joined)

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __call__(self, position: int) -> Element:
        start = Order(len(self), self.seed).index(position) * self.length
        return {"text": self.tokens[start : start + self.length]}


class LanguageModelTask:
    """Next-token prediction.

    Raises ConfigError where the tokenizer does not fit the model, DataError where data are missing.
    """

    schedule = "accumulate"  # of its one stream

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model = TextOnly(build_language_model(config.model, config.dtype))
        self.tokenizer = open_tokenizer(config.data.tokenizer, config.data.bos)
        check_vocabulary(self.tokenizer, config.data.tokenizer, config.model.vocab_size)
        self.windows = partial(Windows, tokenizer=self.tokenizer, length=config.data.length, seed=config.seed)
        self.train = self.windows([open_texts(spec) for spec in config.data.train])
        self._evaluate = jax.jit(
            lambda params, text: next_token_losses(self.model.apply({"params": params}, text), text)
        )

    def streams(self) -> Mapping[str, Stream]:
        return {"text": Stream(self.train, self.config.batch_size)}

    def init(self, rng: jax.Array) -> tuple[PyTree, PyTree]:
        return self.model.init(rng, jnp.zeros((1, self.config.data.length), jnp.int32))["params"], {}

    def sources(self) -> Mapping[str, str]:
        return {}

    def loss(
        self, trainable: PyTree, frozen: PyTree, state: PyTree, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
        logits = self.model.apply({"params": merge(trainable, frozen)}, batch["text"])
        return next_token_losses(logits, batch["text"]).mean(), ({}, state)

    def evaluate(self, params: PyTree, state: PyTree, mesh: Mesh, between: Callable[[], None]) -> dict[str, float]:
        """Mean loss in nats a token on held-out texts, its perplexity, and the loss of guessing."""
        held_out = self.windows([open_texts(self.config.data.evaluate)])
        size = self.config.batch_size
        where = sharding.batch_sharding(mesh)
        rows = sharding.local_rows(where, size)
        total, count = 0.0, 0
        for start in range(0, len(held_out) - size + 1, size):
            between()
            text = held_out.tokens[: len(held_out) * held_out.length].reshape(-1, held_out.length)[start + rows]
            losses = self._evaluate(params, sharding.put_batch({"text": text}, where, size)["text"])
            total, count = total + float(losses.mean()), count + 1
        if not count:
            raise ConfigError(
                f"{self.config.data.evaluate}: {len(held_out)} windows; at least one batch of {size} expected"
            )
        loss = total / count
        chance = math.log(self.config.model.vocab_size)
        return {"held_out.loss": loss, "held_out.perplexity": math.exp(loss), "held_out.chance.loss": chance}

    def metadata(self) -> dict[str, Any]:
        return {
            "family": "language_model",
            "language_model": self.config.model.to_dict(),
            "tokenizer": {"file": Path(self.config.data.tokenizer).name, "sha256": self.tokenizer.digest()},
        }
