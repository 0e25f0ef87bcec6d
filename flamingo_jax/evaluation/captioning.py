"""CIDEr-D (arXiv 1411.5726, section 6), with the constants and the scale of the COCO caption evaluation.

Words are what blanks separate, in lower case. COCO's own figures come after a tokenizer that also takes the
punctuation away: leave it out of captions and references to compare with those.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from clip_jax.errors import DataError

MAX_N = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # words, of the penalty for another length
SCALE = 10.0


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, np.ndarray]:
    """The mean and each candidate's CIDEr-D: 10 where it is its only reference, 0 where they share nothing.

    An n-gram counts for less the more images have it among their references, and nothing where all have it: so
    a score depends on all references given, and that of a single image is 0.

    Raises DataError where there is no candidate, or one has no reference.
    """
    if len(candidates) != len(references) or not len(candidates):
        raise DataError(f"{len(candidates)} candidates, {len(references)} lists of references: expected as many, not 0")
    for i, some in enumerate(references):
        if isinstance(some, str) or not some:
            raise DataError(f"references {i}: {some!r}; expected a list of at least one text")
    counted = [[_ngrams(text) for text in some] for some in references]
    images_with = Counter(ngram for some in counted for ngram in set().union(*some))
    total = np.log(len(candidates))

    def vectors(ngrams: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {gram: n * (total - np.log(max(1, images_with[gram]))) for gram, n in ngrams.items()}

    each = np.zeros(len(candidates))
    for i, candidate in enumerate(map(_ngrams, candidates)):
        mine = vectors(candidate)
        each[i] = SCALE * np.mean([
            _similarity(mine, vectors(other)) * np.exp(-((_length(candidate) - _length(other)) ** 2) / (2 * SIGMA**2))
            for other in counted[i]
        ])  # fmt: skip
    return float(each.mean()), each


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = text.lower().split()
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


def _length(ngrams: Counter[tuple[str, ...]]) -> int:
    """In bigrams, as the reference implementation has it."""
    return sum(n for gram, n in ngrams.items() if len(gram) == 2)


def _similarity(candidate: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """The cosine of each n, averaged over n, where a repeated n-gram earns no more than the reference has."""
    product, candidate_square, reference_square = np.zeros((3, MAX_N))
    for gram, weight in candidate.items():
        candidate_square[len(gram) - 1] += weight**2
        other = reference.get(gram, 0.0)
        product[len(gram) - 1] += min(weight, other) * other
    for gram, weight in reference.items():
        reference_square[len(gram) - 1] += weight**2
    norms = np.sqrt(candidate_square * reference_square)
    return float(np.divide(product, norms, out=np.zeros(MAX_N), where=norms > 0).mean())
