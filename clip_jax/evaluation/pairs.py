"""What a run measures of itself: classification among a source's own names, retrieval by name within a style."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_jax.data.sources import Pair, PairSource
from clip_jax.evaluation import retrieval, zero_shot
from clip_jax.evaluation.encoder import Encoder
from clip_jax.evaluation.hosts import read_over_hosts
from clip_jax.evaluation.prompts import get_templates


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
    texts_and_styles = read_over_hosts(lambda i: described(source[int(records[i])]), len(records))
    names = sorted({text for text, _ in texts_and_styles})
    position = {name: i for i, name in enumerate(names)}
    labels = np.array([position[text] for text, _ in texts_and_styles])
    styles = np.array([style for _, style in texts_and_styles])
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


def described(pair: Pair) -> tuple[str, str]:
    return pair.text, pair.style
