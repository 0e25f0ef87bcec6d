"""Image embeddings for retrieval-based in-context example selection (RICES; Yang et al., arXiv 2109.05014)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from jax.sharding import Mesh

from clip_jax.data import transforms
from clip_jax.data.images import Files
from clip_jax.data.sources import Pair
from clip_jax.errors import DataError
from clip_jax.evaluation.encoder import embedding_encoder
from clip_jax.loading import Loaded
from clip_jax.progress import brief


@dataclass(frozen=True)
class Pictures:
    """Pictures by their paths, as a source."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: SupportsIndex) -> Pair:
        key, data = Files(self.paths)[int(index)]
        return Pair(key, data, text="")


def check_pictures(paths: Sequence[Path], threads: int = 4) -> None:
    """Reads and decodes all of them. Raises RecordError, naming the first that is no image."""
    pictures = Pictures(paths)

    def check(i: int) -> None:
        transforms.read_image(pictures[i].image, pictures[i].key)

    with ThreadPoolExecutor(threads) as pool:
        checked = pool.map(check, range(len(paths)))
        with brief(checked, total=len(paths), desc="check pictures", unit=" pictures") as bar:
            for _ in bar:
                pass


def embed_pictures(
    clip: Loaded, mesh: Mesh, paths: Sequence[Path], *, batch_size: int = 256, threads: int = 4
) -> dict[Path, np.ndarray]:
    """Each picture's embedding, [E] of unit length. `clip`: with its parameters on the mesh.

    Raises DataError for a picture that can't be read.
    """
    rows, good = embedding_encoder(clip, mesh, batch_size, threads).images(Pictures(paths))
    if not good.all():
        raise DataError(f"{paths[int(np.flatnonzero(~good)[0])]}: the image does not decode")
    return dict(zip(paths, rows / np.linalg.norm(rows, axis=1, keepdims=True), strict=True))
