"""Evaluation on image–text pairs: embeddings over the mesh, then zero-shot classification and retrieval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data.pipeline import evaluation_batches
from clip_jax.data.sources import PairSource
from clip_jax.evaluation import retrieval, zero_shot
from clip_jax.evaluation.prompts import get_templates


@dataclass(frozen=True)
class Encoder:
    """Jitted towers with their parameters; every process calls it alike and gets all the embeddings.

    `function(params, state, batch)` → normalised embeddings [batch_size, E], replicated.
    """

    function: Callable[[Any, Any, dict[str, jax.Array]], jax.Array]
    params: Any
    state: Any
    mesh: Mesh
    image_size: int
    tokenize: Callable[[Sequence[str]], np.ndarray]
    batch_size: int

    def images(self, source: PairSource) -> tuple[np.ndarray, np.ndarray]:
        """(embeddings [len, E], good [len] bool: which records decode)."""
        embeddings, good = [], []
        for batch, ok in evaluation_batches(source, self.image_size, self.batch_size, self._rows()):
            embeddings.append(self._embed(batch))
            good.append(self._everywhere(ok))
        return np.concatenate(embeddings)[: len(source)], np.concatenate(good)[: len(source)]

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """[len, E]."""
        ids = self.tokenize(texts)
        padded = np.pad(ids, [(0, -len(ids) % self.batch_size), (0, 0)], mode="edge")
        starts = range(0, len(padded), self.batch_size)
        return np.concatenate([self._embed({"text": padded[s + self._rows()]}) for s in starts])[: len(texts)]

    def _rows(self) -> np.ndarray:
        return sharding.local_rows(sharding.batch_sharding(self.mesh), self.batch_size)

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.put_batch(batch, sharding.batch_sharding(self.mesh), self.batch_size)

    def _embed(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return np.asarray(self.function(self.params, self.state, self._put(batch)))

    def _everywhere(self, rows: np.ndarray) -> np.ndarray:
        gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))
        return np.asarray(gather(self._put({"rows": rows})["rows"]))


@dataclass(frozen=True)
class Evaluation:
    """Figures of a source, and what a page needs to show them."""

    figures: dict[str, Any]  # shares in 0–1, counts, and under "chance" what guessing scores
    names: list[str]  # the classes
    records: np.ndarray  # indices into the source of the images evaluated
    top: np.ndarray  # [len(records), 5] classes, best first
    retrieved: dict[str, np.ndarray]  # style → [classes of that style, 5] records, best first
    queries: dict[str, np.ndarray]  # style → the classes in the rows of `retrieved`


def evaluate_source(encoder: Encoder, source: PairSource, templates: str | Sequence[str] = "{}") -> Evaluation:
    """What `evaluate_scores` makes of the similarity of images and names; `templates`: see `get_templates`."""

    def similarity(image: np.ndarray, names: Sequence[str]) -> np.ndarray:
        return image @ zero_shot.class_embeddings(encoder.texts, names, get_templates(templates)).T

    return evaluate_scores(encoder, source, similarity)


def evaluate_scores(
    encoder: Encoder, source: PairSource, score: Callable[[np.ndarray, Sequence[str]], np.ndarray]
) -> Evaluation:
    """Zero-shot classification among the source's own names, and retrieval by name within each style.

    `score(rows, names)` says how well each name fits each image, of which `encoder.images` makes a row:
    [images, names], the higher the better.

    `top1`, `top5`: over all images. `recall_at_k`: text → image, the share of names that find their picture
    among the first k of all of its style, averaged over styles. `image_to_text_recall_at_k`: the other way.
    Images that do not decode are left out and counted (`rejected`).
    """
    rows, good = encoder.images(source)
    records = np.flatnonzero(good)
    pairs = [source[int(i)] for i in records]
    names = sorted({pair.text for pair in pairs})
    position = {name: i for i, name in enumerate(names)}
    labels = np.array([position[pair.text] for pair in pairs])
    styles = np.array([pair.style for pair in pairs])
    scores_BxC = score(rows[records], names)

    top = np.argsort(-scores_BxC, axis=1, kind="stable")[:, :5]
    figures: dict[str, Any] = {
        "images": len(records),
        "classes": len(names),
        "rejected": len(source) - len(records),
        "top1": zero_shot.accuracy(top, labels, 1),
        "top5": zero_shot.accuracy(top, labels, 5),
    }
    chance = {"top1": 1 / len(names), "top5": min(1.0, 5 / len(names))}
    by_style: dict[str, dict[str, float]] = {}
    chance_by_style: list[dict[str, float]] = []
    retrieved, queries = {}, {}
    for style in sorted(set(styles)):
        mine = np.flatnonzero(styles == style)
        asked = np.unique(labels[mine])
        similarity = scores_BxC[np.ix_(mine, asked)].T
        relevant = asked[:, None] == labels[mine][None, :]
        to_image = retrieval.first_ranks(similarity, relevant)
        to_text = retrieval.first_ranks(similarity.T, relevant.T)
        by_style[str(style)] = {
            "images": len(mine),
            "top1": zero_shot.accuracy(top[mine], labels[mine], 1),
            "top5": zero_shot.accuracy(top[mine], labels[mine], 5),
            **{f"recall_at_{k}": retrieval.recall_at(to_image, k) for k in (1, 5, 10)},
            **{f"image_to_text_recall_at_{k}": retrieval.recall_at(to_text, k) for k in (1, 5, 10)},
        }
        chance_by_style.append(
            {f"recall_at_{k}": min(1.0, k / len(mine)) for k in (1, 5, 10)}
            | {f"image_to_text_recall_at_{k}": min(1.0, k / len(asked)) for k in (1, 5, 10)}
        )
        queries[str(style)] = asked
        retrieved[str(style)] = records[mine[np.argsort(-similarity, axis=1, kind="stable")[:, :5]]]
    for key in chance_by_style[0]:
        figures[key] = float(np.mean([figure[key] for figure in by_style.values()]))
        chance[key] = float(np.mean([figure[key] for figure in chance_by_style]))
    return Evaluation(figures | {"chance": chance, "styles": by_style}, names, records, top, retrieved, queries)
