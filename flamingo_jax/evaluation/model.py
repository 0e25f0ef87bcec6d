"""Any Flamingo that `flamingo_jax.load` opens, as the harness asks it. B prompts a batch, N answers."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data import transforms
from clip_jax.errors import ConfigError
from clip_jax.progress import brief
from flamingo_jax import decoding
from flamingo_jax.data import prompts as written
from flamingo_jax.data.documents import Media, Shape
from flamingo_jax.decoding.scoring import shared
from flamingo_jax.evaluation.harness import Prompt
from flamingo_jax.loading import Loaded

MULTIPLE = 32  # to which the tokens of prompts are rounded up: few programs are compiled
KEPT = 2048  # pictures that stay decoded; a support set is seen again and again


class FlamingoModel:
    """Parameters as `flamingo_jax.load(spec, mesh=mesh)` placed them; batches over the data-parallel axes.

    `spec` is what result files call the model.
    """

    def __init__(self, loaded: Loaded, mesh: Mesh, spec: str, batch_size: int = 8, threads: int = 4):
        self._loaded, self._mesh, self._spec, self._threads = loaded, mesh, spec, threads
        parts = sharding.batch_shards(mesh)
        self._batch_size = -(-batch_size // parts) * parts
        self._where = sharding.batch_sharding(mesh)
        with sharding.use_mesh(mesh):
            self._variables = decoding.unstack(loaded.params)
        self._whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
        self._blank = Media(np.zeros((1, 1, 1, 3), np.uint8))

        @lru_cache(maxsize=KEPT)
        def see(image: Path) -> Media:
            return written.see(image, loaded.preprocess)

        self._see: Callable[[Path], Media] = see

    def describe(self) -> Mapping[str, Any]:
        loaded = self._loaded
        return {
            "spec": self._spec,
            "family": loaded.convention.family,
            "tokenizer_sha256": loaded.tokenizer.digest(),
            "preprocess": dict(loaded.preprocess.__dict__),
            "dtype": str(loaded.model.language_model.dtype),
        }

    def show(self, prompt: Prompt) -> str:
        return str(self._written(prompt, self._blank_at))

    def check(self, prompts: Sequence[Prompt], new_tokens: int, answers: Sequence[str] = ()) -> None:
        self._shape(prompts, self._continuations(prompts[0], answers)[0].shape[1] if answers else new_tokens)

    def say(self, prompts: Sequence[Prompt], *, new_tokens: int, beams: int) -> list[str]:
        def generate(batch: Mapping[str, jax.Array]) -> jax.Array:
            return decoding.generate(
                self._loaded.model, self._variables, batch, max_new_tokens=new_tokens, num_beams=beams,
                stop_ids=self._loaded.stop_ids,
            ).tokens  # fmt: skip

        rows = self._map(generate, prompts, new_tokens)
        return [self._loaded.tokenizer.decode(self._until_stop(row)) for row in rows.tolist()]

    def log_likelihoods(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> np.ndarray:
        continuations, mask, cut = self._continuations(prompts[0], answers)

        def score(batch: Mapping[str, jax.Array]) -> jax.Array:
            return decoding.score(self._loaded.model, self._variables, batch, continuations, mask)

        return self._map(score, prompts, continuations.shape[1], cut).astype(np.float64)

    def _continuations(self, prompt: Prompt, answers: Sequence[str]) -> tuple[np.ndarray, np.ndarray, int]:
        """(ids [N, L], which of them are real, how many of a prompt's last tokens they stand in for, below 0).

        Where a tokenizer joins the prompt's last letters with an answer's first ones, all count from there.
        """
        asked = self._ids(prompt)
        whole = [self._ids(prompt, answer) for answer in answers]
        same = min(shared(asked, ids) for ids in whole)
        return *decoding.pad_continuations([ids[same:] for ids in whole]), same - len(asked)

    def _written(self, prompt: Prompt, see: Callable[[Path], Media], answer: str | None = None) -> written.Prompt:
        found = written.begin(self._loaded.convention, question=prompt[-1].template or None)
        media = [None if example.image is None else see(example.image) for example in prompt]
        for example, one in zip(prompt[:-1], media, strict=False):
            found = found.shot(one, example.answer, example.question)
        asked = prompt[-1].question
        return found.ask(media[-1], asked) if answer is None else found.shot(media[-1], answer, asked)

    def _blank_at(self, image: Path) -> Media:
        return self._blank

    def _ids(self, prompt: Prompt, answer: str | None = None) -> list[int]:
        return self._written(prompt, self._blank_at, answer).ids(self._loaded.tokenizer)

    def _shape(self, prompts: Sequence[Prompt], new_tokens: int) -> Shape:
        """Room for all of them. Raises ConfigError where the model has no positions for them and an answer."""
        longest = max(len(self._ids(prompt)) for prompt in prompts)
        tokens = -(-longest // MULTIPLE) * MULTIPLE
        spec = self._loaded.model.language_model.spec
        if spec.positions == "learned":
            if longest + new_tokens > spec.max_positions:
                raise ConfigError(
                    f"a prompt of {longest} tokens, and {new_tokens} for the answer; the model has "
                    f"{spec.max_positions} positions: take fewer shots"
                )
            tokens = min(tokens, spec.max_positions - new_tokens)  # rounded up no further than it has room for
        images = max(1, *(sum(example.image is not None for example in prompt) for prompt in prompts))
        return Shape(images, 1, self._loaded.preprocess.image_size, tokens)

    def _map(
        self,
        function: Callable[[Mapping[str, jax.Array]], jax.Array],
        prompts: Sequence[Prompt],
        new_tokens: int,
        cut: int = 0,
    ) -> np.ndarray:
        """`function` of all prompts, batch by batch; `cut`: how many of their last tokens are left out, below 0."""
        shape, preprocess = self._shape(prompts, new_tokens), self._loaded.preprocess
        rows = sharding.local_rows(self._where, self._batch_size)
        found = []
        starts = range(0, len(prompts), self._batch_size)
        with (
            ThreadPoolExecutor(self._threads) as pool, sharding.use_mesh(self._mesh),
            brief(starts, total=len(starts), desc="prompts", unit="batch") as bar,
        ):  # fmt: skip
            for start in bar:
                some = [prompts[min(start + int(row), len(prompts) - 1)] for row in rows]  # the last one fills it up
                list(pool.map(self._see, {e.image for prompt in some for e in prompt if e.image}))
                documents = [self._written(prompt, self._see) for prompt in some]
                batch = written.encode_prompts(documents, self._loaded.tokenizer, shape)
                for name in ("text", "text_mask", "media_mask"):
                    batch[name] = batch[name][:, : cut or None]
                placed = sharding.put_batch(batch, self._where, self._batch_size)
                placed["media"] = transforms.normalize(placed["media"], preprocess.mean, preprocess.std)
                found.append(np.asarray(self._whole(function(placed))))
        return np.concatenate(found)[: len(prompts)]

    def _until_stop(self, ids: Sequence[int]) -> list[int]:
        end = next((i for i, token in enumerate(ids) if token in self._loaded.stop_ids), len(ids))
        return list(ids[:end])
