"""Exact search in files of embeddings, and a page that shows what was found.

Dimension letters: Q queries, N rows of the file, C rows of a chunk, E width, k results.
"""

import base64
import functools
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from PIL import Image

from clip_jax import sharding
from clip_jax.data.images import Images
from clip_jax.data.transforms import read_image
from clip_jax.embedding import Embedder, EmbeddingFile
from clip_jax.errors import ConfigError, DataError, RecordError
from clip_jax.files import write_atomically
from clip_jax.progress import brief

CHUNK = 65_536  # rows on all devices at once


def nearest(
    queries_QxE: np.ndarray,
    chunks: Iterable[np.ndarray],
    k: int,
    mesh: Mesh,
    chunk: int = CHUNK,
    faiss: ModuleType | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows of the greatest inner product with each query: every row is compared, in float32.

    Args:
      queries_QxE: the queries.
      chunks: the rows, in pieces of `chunk` (the last may be smaller), as `EmbeddingFile.chunks` gives them.
      k: how many; all rows where there are fewer.
      mesh: the rows of a piece are sharded over its data-parallel devices; each finds its own k first.
      faiss: the library, which then compares them on the CPU instead.

    Returns:
      (scores [Q, k] float32, best first; rows [Q, k] int64); of equal scores the earlier row comes first.
    """
    chunk = -(-chunk // sharding.batch_shards(mesh)) * sharding.batch_shards(mesh)
    best = functools.partial(_best_of_chunk, k=k, mesh=mesh)
    queries = jax.device_put(np.asarray(queries_QxE, np.float32), sharding.replicated(mesh))
    scores = np.zeros((len(queries_QxE), 0), np.float32)
    rows = np.zeros((len(queries_QxE), 0), np.int64)
    start = 0
    for piece in chunks:
        if faiss is not None and (found := _best_by_faiss(faiss, queries_QxE, piece, k)):
            new_scores, new_rows = found
        else:
            padded = np.pad(piece, [(0, chunk - len(piece)), (0, 0)])
            placed = jax.device_put(padded, sharding.batch_sharding(mesh))
            new_scores, new_rows = jax.device_get(best(queries, placed, len(piece)))
        # The rows found so far come first and the sort is stable: an earlier row wins a tie.
        scores = np.concatenate([scores, new_scores], axis=1)
        rows = np.concatenate([rows, new_rows.astype(np.int64) + start], axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        start += len(piece)
    k = min(k, start)  # what lies beyond is padding, of score -inf
    return scores[:, :k], rows[:, :k]


def faiss_on_cpu() -> ModuleType | None:
    """The library (the extra `search`) where it is installed and JAX's devices are CPUs."""
    if jax.default_backend() != "cpu":
        return None
    logging.getLogger("faiss").setLevel(logging.WARNING)  # it says that it was loaded
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def _best_by_faiss(
    faiss: ModuleType, queries_QxE: np.ndarray, rows_CxE: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(scores [Q, ≤k], rows [Q, ≤k]), of equal scores the earlier row first; None where a tie decides who is among k.

    Which of equal rows the library's heap keeps is not defined; one more than is asked for shows whether it matters.
    """
    count = min(k + 1, len(rows_CxE))
    queries, rows = (np.ascontiguousarray(x, np.float32) for x in (queries_QxE, rows_CxE))
    scores, found = faiss.knn(queries, rows, count, metric=faiss.METRIC_INNER_PRODUCT)
    if count > k and (scores[:, k - 1] == scores[:, k]).any():
        return None
    order = np.lexsort((found, -scores))[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


@functools.partial(jax.jit, static_argnames=("k", "mesh"))
def _best_of_chunk(
    queries_QxE: jax.Array, rows_CxE: jax.Array, count: jax.Array, *, k: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """(scores [Q, ≤k · devices], rows [Q, ≤k · devices]): each device's best, in the order of the devices."""

    def local(queries_QxE: jax.Array, rows_CxE: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = jax.lax.axis_index(sharding.BATCH_AXES) * len(rows_CxE)
        position_C = first + jnp.arange(len(rows_CxE))
        score_QxC = jnp.einsum("qe,ce->qc", queries_QxE, rows_CxE, precision="highest")
        scores_Qxk, found_Qxk = jax.lax.top_k(jnp.where(position_C < count, score_QxC, -jnp.inf), min(k, len(rows_CxE)))
        return scores_Qxk, position_C[found_Qxk]

    columns = PartitionSpec(None, sharding.BATCH_AXES)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(sharding.BATCH_AXES), PartitionSpec()),
        out_specs=(columns, columns),
    )(queries_QxE, rows_CxE, count)


@dataclass(frozen=True)
class Found:
    """What one query found, best first."""

    query: str
    keys: list[str]
    indices: list[int]  # positions in the source
    scores: list[float]  # cosines


def search_file(
    embedder: Embedder, file: EmbeddingFile, queries: Sequence[str], embeddings_QxE: np.ndarray, k: int
) -> list[Found]:
    """Searches a file by queries that the same model has embedded.

    Raises DataError where another model made the file, ConfigError where k is below 1.
    """
    if k < 1:
        raise ConfigError(f"{k} results: at least 1 expected")
    if not {"kind", "source"} <= file.metadata.keys():
        raise DataError(f"{file.path}: not a file of embeddings that `embed` wrote (its source is missing)")
    made_with = file.metadata.get("model_sha256")
    if made_with != embedder.digest():
        raise DataError(f"{file.path}: was made with another model (its sha256 is {made_with})")
    if file.width != embeddings_QxE.shape[1]:
        raise DataError(f"{file.path}: embeddings of width {file.width}; this model's have {embeddings_QxE.shape[1]}")
    with brief(file.chunks(CHUNK), total=-(-len(file) // CHUNK), desc="search", unit="chunk") as chunks:
        scores, rows = nearest(embeddings_QxE, chunks, k, embedder.mesh, faiss=faiss_on_cpu())
    return [
        Found(
            query,
            [file.key(int(row)) for row in rows[i]],
            [int(file.indices[row]) for row in rows[i]],
            [round(float(score), 4) for score in scores[i]],
        )
        for i, query in enumerate(queries)
    ]


def write_page(path: Path, title: str, found: Sequence[Found], picture: Callable[[int], str] | None) -> None:
    """Writes a page that needs nothing beside it. `picture`: an item's position → a data URI, "" for none."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    groups = []
    for one in found:
        pictures = [picture(index) if picture else "" for index in one.indices]
        items: list[dict[str, Any]] = [
            {"key": key.encode("utf-8", "replace").decode(), "score": score, "uri": uri}
            for key, score, uri in zip(one.keys, one.scores, pictures, strict=True)
        ]
        groups.append({"query": one.query.encode("utf-8", "replace").decode(), "items": items})
    write_atomically(path, environment.get_template("search.html.j2").render(title=title, groups=groups))


def thumbnails(images: Images, side: int = 192) -> Callable[[int], str]:
    """Position → a small WebP as a data URI; "" where the image can no longer be read."""

    def picture(index: int) -> str:
        try:
            key, data = images[index]
            image = read_image(data, key).convert("RGB")
        except (RecordError, IndexError):
            return ""
        image.thumbnail((side, side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=80)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    return picture
