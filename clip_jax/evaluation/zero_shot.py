"""Zero-shot classification (arXiv 2103.00020 §3.1). Dimension letters: B images, C classes, E width."""

from collections.abc import Callable, Sequence

import numpy as np

from clip_jax.evaluation.hosts import parts_of

SCORES_AT_ONCE = 2**24


def class_embeddings(
    encode: Callable[[Sequence[str]], np.ndarray], names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> np.ndarray:
    """A class's embedding: its prompts encoded, each normalised, their mean, normalised again.

    Args:
      encode: texts → normalised embeddings [len, E].
      names: the C classes.
      templates: prompts with one `{}` for the name.

    Returns:
      [C, E] float32.
    """
    prompts = [template.format(name) for name in names for template in templates]
    mean = encode(prompts).reshape(len(names), len(templates), -1).mean(axis=1)
    return mean / np.linalg.norm(mean, axis=-1, keepdims=True)


def top_classes(image_embeddings: np.ndarray, classes: np.ndarray, k: int) -> np.ndarray:
    """The k most similar classes of each image, best first, ties to the lower index. [B, k] int."""
    parts = parts_of(len(image_embeddings), max(1, SCORES_AT_ONCE // len(classes)))
    return np.concatenate(
        [np.argsort(-(image_embeddings[part] @ classes.T), axis=1, kind="stable")[:, :k] for part in parts]
    )


def top_probabilities(
    image_embeddings: np.ndarray, classes: np.ndarray, logit_scale: float, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """(`top_classes` [B, k], their probabilities [B, k]): the softmax over all classes at the model's temperature."""
    logits = logit_scale * (image_embeddings @ classes.T).astype(np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    top = top_classes(image_embeddings, classes, k)
    return top, np.take_along_axis(exponentials / exponentials.sum(axis=1, keepdims=True), top, axis=1)


def accuracy(top: np.ndarray, labels: np.ndarray, k: int) -> float:
    """The share of images whose label is among their first k classes."""
    return float((top[:, :k] == labels[:, None]).any(axis=1).mean())
