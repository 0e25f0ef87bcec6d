"""Towers that embed a data set over a mesh; every process gets all the embeddings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data import transforms
from clip_jax.data.pipeline import evaluation_batches
from clip_jax.data.preprocess import Preprocess
from clip_jax.data.sources import PairSource
from clip_jax.errors import DataError
from clip_jax.loading import Loaded
from clip_jax.progress import brief


def nothing() -> None:
    """What happens between batches where nothing is asked for."""


@dataclass(frozen=True)
class Encoder:
    """Jitted towers with their parameters. Every process calls it alike, and reads the rows its devices hold.

    `function(params, state, batch)`, with a batch of uint8 images or of ids, → rows [batch_size, E], replicated.
    """

    function: Callable[[Any, Any, dict[str, jax.Array]], jax.Array]
    params: Any
    state: Any
    mesh: Mesh
    preprocess: Preprocess
    tokenize: Callable[[Sequence[str]], np.ndarray]
    batch_size: int
    threads: int = 2  # that decode images
    between: Callable[[], None] = nothing  # called before every batch; what it raises ends the work

    def images(self, source: PairSource) -> tuple[np.ndarray, np.ndarray]:
        """(rows [len, E], good [len] bool: which records decode). Raises DataError where none does."""
        found, good = [], []
        batches = evaluation_batches(source, self.preprocess, self.batch_size, self._rows(), self.threads)
        with brief(batches, total=-(-len(source) // self.batch_size), desc="images", unit="batch") as bar:
            for batch, ok in bar:
                found.append(self._embed(batch))
                good.append(self._everywhere(ok))
        everywhere = np.concatenate(good)[: len(source)]
        if not everywhere.any():
            raise DataError(f"not one of {len(source)} images could be read; see the warnings above")
        return np.concatenate(found)[: len(source)], everywhere

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """[len, E]."""
        ids = self.tokenize(texts)
        padded = np.pad(ids, [(0, -len(ids) % self.batch_size), (0, 0)], mode="edge")
        starts = range(0, len(padded), self.batch_size)
        with brief(starts, total=len(starts), desc="texts", unit="batch") as bar:
            return np.concatenate([self._embed({"text": padded[s + self._rows()]}) for s in bar])[: len(texts)]

    def _rows(self) -> np.ndarray:
        return sharding.local_rows(sharding.batch_sharding(self.mesh), self.batch_size)

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.put_batch(batch, sharding.batch_sharding(self.mesh), self.batch_size)

    def _embed(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        self.between()
        rows = np.asarray(self.function(self.params, self.state, self._put(batch)))
        if not np.isfinite(rows).all():  # what is no number ranks before everything
            raise DataError(f"the model's {' and '.join(batch)} embeddings hold values that are no finite numbers")
        return rows

    def _everywhere(self, rows: np.ndarray) -> np.ndarray:
        gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))
        return np.asarray(gather(self._put({"rows": rows})["rows"]))


def embedding_encoder(loaded: Loaded, mesh: Mesh, batch_size: int, threads: int) -> Encoder:
    """Images and texts → embeddings of unit length. `loaded`: with its parameters on the mesh."""

    def embed(params: Mapping[str, Any], _: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        image, text, _ = loaded.model.apply(params, normalized(loaded, batch))
        embedding = text if image is None else image
        return embedding

    return _encoder(loaded, mesh, embed, batch_size, threads)


def feature_encoder(loaded: Loaded, mesh: Mesh, batch_size: int, threads: int) -> Encoder:
    """Images → what a linear probe looks at (arXiv 2103.00020, appendix A.3).

    Of a ViT with a class token its feature before the projection to the joint space, after `ln_post`; of any other
    tower what it pools to, before it is brought to unit length.
    """
    vision = loaded.model.vision
    before_projection = getattr(vision, "pool", "") == "class"

    def features(params: Mapping[str, Any], _: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
        own = {collection: tree["vision"] for collection, tree in params.items()}
        (pooled, _), state = vision.apply(
            own,
            normalized(loaded, batch)["image"],
            capture_intermediates=lambda module, method: module.name == "ln_post" and method == "__call__",
            mutable=["intermediates"],
        )
        return state["intermediates"]["ln_post"]["__call__"][0] if before_projection else pooled

    return _encoder(loaded, mesh, features, batch_size, threads)


def normalized(loaded: Loaded, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    mean, std = loaded.preprocess.mean, loaded.preprocess.std
    return {key: transforms.normalize(value, mean, std) if key == "image" else value for key, value in batch.items()}


def _encoder(loaded: Loaded, mesh: Mesh, function: Callable[..., jax.Array], batch_size: int, threads: int) -> Encoder:
    parts = sharding.batch_shards(mesh)
    return Encoder(
        function=jax.jit(function, out_shardings=sharding.replicated(mesh)),
        params=loaded.params,
        state={},
        mesh=mesh,
        preprocess=loaded.preprocess,
        tokenize=loaded.tokenizer,
        batch_size=-(-batch_size // parts) * parts,
        threads=threads,
    )
