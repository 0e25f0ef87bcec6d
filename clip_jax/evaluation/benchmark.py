"""A model measured on any data: zero-shot classification, retrieval and a linear probe, as JSON and as a table.

Embedding is sharded over the mesh and over hosts; every process gets the same figures.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from clip_jax.data.sources import PairSource, captions_at
from clip_jax.errors import ConfigError, DataError, RecordError
from clip_jax.evaluation import retrieval, zero_shot
from clip_jax.evaluation.encoder import embedding_encoder, feature_encoder
from clip_jax.evaluation.hosts import read_over_hosts
from clip_jax.evaluation.linear_probe import linear_probe, mean_per_class_accuracy
from clip_jax.evaluation.prompts import get_templates
from clip_jax.loading import Loaded

TASKS = ("zero_shot", "retrieval", "linear_probe")
HELD_OUT = 5  # every fifth training example of a class validates the probe's regularisation


def evaluate(
    loaded: Loaded,
    mesh: Mesh,
    source: PairSource,
    tasks: Sequence[str] = (),
    *,
    templates: str | Sequence[str] = "{}",
    class_names: Sequence[str] | None = None,
    train: PairSource | None = None,
    batch_size: int = 256,
    threads: int = 4,
) -> dict[str, Any]:
    """Figures of each task; shares in 0–1, under "chance" what guessing scores. Call it inside `use_mesh`.

    A record whose image does not decode, or without a text, is left out, named in the log and counted (`rejected`).

    Args:
      loaded: the model, with its parameters on the mesh.
      source: what it is measured on.
      tasks: of TASKS; by default zero_shot where the source has classes, retrieval where it has captions.
      templates: prompts of zero_shot, see `get_templates`.
      class_names: what the prompts call the source's classes, in their order, instead of the source's own names.
      train: what a linear probe is fitted to.
      batch_size: images or texts embedded at once, on all devices together.
      threads: that decode images, on each host.

    Raises:
      ConfigError: an unknown task, class names that don't fit, or a linear probe without training data.
      DataError: a task that the source has no labels or captions for, or nothing that can be read.
    """
    classes = getattr(source, "classes", None)
    tasks = tuple(tasks) or (("zero_shot",) if classes else ("retrieval",))
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"task {task!r}: expected one of {', '.join(TASKS)}")
    if ("linear_probe" in tasks) != (train is not None):
        raise ConfigError("a linear probe needs training data, and nothing else does: give both or neither")
    if "retrieval" in tasks and classes:
        raise DataError("retrieval needs captions; the texts of this source are names of classes")
    if class_names is not None and len(class_names) != len(classes or ()):
        raise ConfigError(f"{len(class_names)} class names; the source has {len(classes or ())} classes")

    results: dict[str, Any] = {}
    embed = embedding_encoder(loaded, mesh, batch_size, threads)
    cut = loaded.tokenizer.truncated
    captions = read_captions(source)
    if set(tasks) & {"zero_shot", "retrieval"}:
        rows, good = embed.images(source)
        kept = [i for i in np.flatnonzero(good) if captions[i]]
        if not kept:
            raise DataError(f"not one of {len(source)} records has both an image and a text; see the warnings above")
        results |= {"images": len(kept), "rejected": len(source) - len(kept)}
        image = rows[kept]
        texts = [captions[i] for i in kept]
        if "zero_shot" in tasks:
            names, labels = labels_of(texts, classes)
            prompts = get_templates(templates)
            results["zero_shot"] = classification(embed.texts, image, labels, class_names or names, prompts)
        if "retrieval" in tasks:
            results["retrieval"] = search_both_ways(embed.texts, image, texts)
        results["truncated_texts"] = loaded.tokenizer.truncated - cut
    if train is not None:
        features = feature_encoder(loaded, mesh, batch_size, threads)
        split = [(*features.images(s), c) for s, c in ((train, read_captions(train)), (source, captions))]
        results["linear_probe"] = probe(*split)
    return results


def read_captions(source: PairSource) -> list[tuple[str, ...]]:
    """Of every record its captions; none where it can't be read, which the log names. Each process reads its share."""

    def read(i: int) -> tuple[str, ...]:
        try:
            texts = captions_at(source, i)
            if not all(text.strip() for text in texts):
                raise RecordError(f"record {i}: the text is empty")
        except RecordError as error:
            logging.warning("record left out of the evaluation: %s", error)
            return ()
        return texts

    return [tuple(texts) for texts in read_over_hosts(read, len(source))]


def labels_of(captions: Sequence[tuple[str, ...]], classes: Sequence[str] | None) -> tuple[list[str], np.ndarray]:
    """(the names of the classes, each record's class). Without classes of the source's own, its texts are theirs."""
    if several := [texts for texts in captions if len(texts) > 1]:
        raise DataError(f"classes expected, one for an image; there are several captions ({several[0][0]!r}, …)")
    names = list(classes) if classes else sorted({text for (text,) in captions})
    position = {name: i for i, name in enumerate(names)}
    return names, np.array([position[text] for (text,) in captions])


def classification(
    encode: Callable[[Sequence[str]], np.ndarray],
    image_NxE: np.ndarray,
    labels_N: np.ndarray,
    names: Sequence[str],
    templates: Sequence[str],
) -> dict[str, Any]:
    """Zero-shot figures. `mean_per_class_accuracy` is of the classes that have images, each of the same weight."""
    top = zero_shot.top_classes(image_NxE, zero_shot.class_embeddings(encode, names, templates), 5)
    right = top[:, 0] == labels_N
    return {
        "classes": len(names),
        "templates": len(templates),
        "top1": zero_shot.accuracy(top, labels_N, 1),
        "top5": zero_shot.accuracy(top, labels_N, 5),
        "mean_per_class_accuracy": mean_per_class_accuracy(top[:, 0], labels_N),
        "chance": {
            "top1": 1 / len(names),
            "top5": min(1.0, 5 / len(names)),
            "mean_per_class_accuracy": 1 / len(names),
        },
        "per_class": [
            {"name": names[c], "images": int((labels_N == c).sum()), "top1": float(right[labels_N == c].mean())}
            for c in np.unique(labels_N)
        ],
    }


def search_both_ways(
    encode: Callable[[Sequence[str]], np.ndarray], image_NxE: np.ndarray, captions: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    """Retrieval figures of images that may each have several captions."""
    counts = np.array([len(texts) for texts in captions])
    texts = [text for of_one in captions for text in of_one]
    figures = retrieval.both_ways(image_NxE, encode(texts), np.repeat(np.arange(len(counts)), counts))
    chance = {}
    for k in (1, 5, 10):
        chance[f"recall_at_{k}"] = min(1.0, k / len(counts))
        chance[f"image_to_text_recall_at_{k}"] = retrieval.chance_of_recall(counts, len(texts), k)
    return {"captions": len(texts), **figures, "chance": chance}


Split = tuple[np.ndarray, np.ndarray, list[tuple[str, ...]]]  # features, which records are good, captions


def probe(train: Split, test: Split) -> dict[str, Any]:
    """A linear probe's figures. A fifth of each class's training examples validates its regularisation."""
    (x, y_names), (test_x, test_names) = (
        (features[kept], [captions[i] for i in kept])
        for features, good, captions in (train, test)
        for kept in [[i for i in np.flatnonzero(good) if captions[i]]]
    )
    names, y = labels_of([*y_names, *test_names], None)
    y, test_y = y[: len(x)], y[len(x) :]
    held = held_out(y)
    found = linear_probe(x[~held], y[~held], (x[held], y[held]), (test_x, test_y))
    return {
        "classes": len(names),
        "train_images": len(x),
        "test_images": len(test_x),
        "accuracy": found.accuracy,
        "mean_per_class_accuracy": found.mean_per_class_accuracy,
        "inverse_regularisation": found.inverse_regularisation,
        "sweep": [{"inverse_regularisation": c, "validation_accuracy": a} for c, a in found.sweep],
        "chance": {"accuracy": 1 / len(names), "mean_per_class_accuracy": 1 / len(names)},
    }


def held_out(labels_N: np.ndarray, seed: int = 0) -> np.ndarray:
    """[N] bool: of each class a fifth, at least one where it has two, in an order drawn from the seed."""
    held = np.zeros(len(labels_N), bool)
    order = np.random.default_rng(seed).permutation(len(labels_N))
    for label in np.unique(labels_N):
        mine = order[labels_N[order] == label]
        held[mine[: max(len(mine) // HELD_OUT, int(len(mine) > 1))]] = True
    return held


def table(results: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = ["| task | figure | value | chance |", "|---|---|---:|---:|"]
    for task in TASKS:
        for key, value in results.get(task, {}).items():
            if isinstance(value, int | float):
                chance = results[task]["chance"].get(key)
                lines.append(f"| {task} | {key} | {shown(key, value)} | {'' if chance is None else f'{chance:.2%}'} |")
    return "\n".join(lines)


def shown(key: str, value: float) -> str:
    is_share = key.startswith("top") or "recall" in key or "accuracy" in key
    return f"{value:.2%}" if is_share else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
