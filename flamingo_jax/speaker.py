"""A loaded Flamingo that goes on with prompts, aloud where one listens, and says how likely continuations are.

Dimensions: B prompts of L tokens, T images, N continuations.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data import transforms
from clip_jax.errors import ConfigError
from flamingo_jax import decoding
from flamingo_jax.data.documents import Shape
from flamingo_jax.data.prompts import Prompt, begin, encode_prompts, shape_of
from flamingo_jax.decoding.scoring import shared
from flamingo_jax.loading import Loaded


@dataclass(frozen=True)
class Manner:
    """How a text is chosen: see `flamingo_jax.decoding.generate`. `stop`: texts that end one."""

    max_new_tokens: int = 32
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


class Speaker:
    """One model on all devices: parameters are sharded as at training, batches over the data-parallel axes.

    Give it what `flamingo_jax.load(…, mesh=mesh)` returned.
    """

    def __init__(self, loaded: Loaded, mesh: Mesh, manner: Manner = Manner(), batch_size: int = 1):
        self.loaded, self.mesh = loaded, mesh
        self._set(manner, batch_size)
        with self._mesh():
            self._variables = decoding.unstack(loaded.params)

    def _set(self, manner: Manner, batch_size: int) -> None:
        self.manner, parts = manner, sharding.batch_shards(self.mesh)
        self.batch_size = batch_size if batch_size == 1 else -(-batch_size // parts) * parts
        self._where = sharding.replicated(self.mesh) if self.batch_size == 1 else sharding.batch_sharding(self.mesh)
        self._key = jax.random.key(manner.seed)

    def but(self, manner: Manner, batch_size: int) -> "Speaker":
        """The same model, in the same memory, in another manner."""
        other = copy.copy(self)
        other._set(manner, batch_size)
        return other

    def begin(self, caption: str | None = None, question: str | None = None) -> Prompt:
        """See `flamingo_jax.data.prompts.begin`."""
        return begin(self.loaded.convention, caption, question)

    def shape(self, prompts: Sequence[Prompt], multiple: int = 16, images: int = 1) -> Shape:
        """Room for these prompts, numbers of tokens and images rounded up to multiples.

        Raises ConfigError where the model has no positions for them and an answer.
        """
        loaded, spec, new = self.loaded, self.loaded.model.language_model.spec, self.manner.max_new_tokens
        shape = shape_of(prompts, loaded.tokenizer, loaded.preprocess.image_size, multiple, images)
        if spec.positions == "learned" and shape.tokens + new > spec.max_positions:
            self.check_length(max(len(prompt.ids(loaded.tokenizer)) for prompt in prompts) + new)
            shape = replace(shape, tokens=spec.max_positions - new)  # rounded up no further than it has room for
        return shape

    def check_length(self, tokens: int) -> None:
        spec = self.loaded.model.language_model.spec
        if spec.positions == "learned" and tokens > spec.max_positions:
            raise ConfigError(f"{tokens} tokens, the answer's included; the model has {spec.max_positions} positions")

    def say(self, prompts: Sequence[Prompt], shape: Shape) -> list[str]:
        """What the model says after each of at most `batch_size` prompts."""
        return self._texts(self._generate(self._batch(prompts, shape)), len(prompts))

    def say_aloud(self, prompt: Prompt, shape: Shape, listen: Callable[[str], Any]) -> str:
        """The same for one prompt; `listen` gets the text piece by piece as it comes (with beams, whole)."""
        (text,) = self.say_together([prompt], shape, [listen])
        return text

    def say_together(
        self, prompts: Sequence[Prompt], shape: Shape, listeners: Sequence[Callable[[str], Any]]
    ) -> list[str]:
        """`say`, with a listener for each prompt. What a listener raises ends it."""
        ids: list[list[int]] = [[] for _ in prompts]
        heard = [""] * len(prompts)

        def hear(row: int, text: str) -> None:
            if len(text) > len(heard[row]):
                listeners[row](text[len(heard[row]) :])
                heard[row] = text

        def take(tokens_Bx1: np.ndarray) -> None:
            for row, token in enumerate(tokens_Bx1[: len(prompts), 0].tolist()):
                if token >= 0 and token not in self.loaded.stop_ids:
                    ids[row].append(token)
                    hear(row, settled(self._decode(ids[row]), self.manner.stop))

        batch = self._batch(prompts, shape)
        texts = self._texts(self._generate(batch, None if self.manner.num_beams > 1 else take), len(prompts))
        for row, text in enumerate(texts):
            hear(row, text)
        return texts

    def score(self, prompt: Prompt, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """How likely each text is to follow the prompt: (log p, the sum over its tokens; the tokens' number), [N] each.

        Where a tokenizer joins the prompt's last letters with a text's first ones, all count from there.
        """
        tokenizer = self.loaded.tokenizer
        asked = prompt.ids(tokenizer)
        whole = [prompt.answered(text).ids(tokenizer) for text in texts]
        same = min(shared(asked, ids) for ids in whole)
        for text, ids in zip(texts, whole, strict=True):
            if len(ids) == same:
                raise ConfigError(f"the text {text!r}: empty; something to score expected")
        self.check_length(max(map(len, whole)))
        shape = shape_of([prompt], tokenizer, self.loaded.preprocess.image_size, tokens=1)
        batch = self._batch([prompt], shape)
        for name in ("text", "text_mask", "media_mask"):
            batch[name] = batch[name][:, : same - len(asked) or None]
        continuations, mask = decoding.pad_continuations([ids[same:] for ids in whole])
        with self._mesh():
            found = decoding.score(self.loaded.model, self._variables, batch, continuations, mask)
        return np.asarray(found)[0], mask.sum(axis=1)

    def _mesh(self) -> AbstractContextManager[None]:
        return sharding.use_mesh(self.mesh)

    def _batch(self, prompts: Sequence[Prompt], shape: Shape) -> dict[str, jax.Array]:
        """Placed on the devices; the last prompt fills the batch up."""
        filled = [*prompts, *[prompts[-1]] * (self.batch_size - len(prompts))]
        batch = encode_prompts(filled, self.loaded.tokenizer, shape)
        placed = sharding.put_batch(batch, self._where, self.batch_size)
        preprocess = self.loaded.preprocess
        return placed | {"media": transforms.normalize(placed["media"], preprocess.mean, preprocess.std)}

    def _generate(self, batch: Mapping[str, jax.Array], on_tokens: Callable[[np.ndarray], Any] | None = None) -> Any:
        manner = self.manner
        self._key, key = jax.random.split(self._key)
        with self._mesh():
            return decoding.generate(
                self.loaded.model, self._variables, batch, max_new_tokens=manner.max_new_tokens,
                num_beams=manner.num_beams, length_penalty=manner.length_penalty, temperature=manner.temperature,
                top_k=manner.top_k, top_p=manner.top_p, key=key, stop_ids=self.loaded.stop_ids,
                stop_strings=() if manner.num_beams > 1 else manner.stop, decode=self._decode, on_tokens=on_tokens,
            )  # fmt: skip

    def _decode(self, ids: Sequence[int]) -> str:
        return self.loaded.tokenizer.decode(ids)

    def _texts(self, generated: decoding.Generated, count: int) -> list[str]:
        rows = zip(np.asarray(generated.tokens)[:count], np.asarray(generated.lengths), strict=False)
        words = [[int(token) for token in row[:length] if token not in self.loaded.stop_ids] for row, length in rows]
        return [decoding.truncate(self._decode(ids), self.manner.stop).strip() for ids in words]


def settled(text: str, stop: Sequence[str]) -> str:
    """What of a text that still grows stays: without a character, a blank or a stop string that has only begun."""
    text = decoding.truncate(text, stop)
    begun = max((k for s in stop for k in range(1, len(s)) if text.endswith(s[:k])), default=0)
    return text[: len(text) - begun].rstrip("\N{REPLACEMENT CHARACTER}").strip()
