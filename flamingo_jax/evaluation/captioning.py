"""Captions against references: CIDEr-D (arXiv 1411.5726, section 6) and BLEU (Papineni et al., 2002), with the
constants and the scale of the COCO caption evaluation.

Both take words to be what blanks separate, in lower case. COCO's own figures come after the Penn Treebank's
tokenizer, and without punctuation: `coco_words` does as it does.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from clip_jax.errors import DataError

MAX_N = 4  # n-grams of 1 to 4 words
SIGMA = 6.0  # words, of the penalty for another length
SCALE = 10.0

PUNCTUATION = ("-", "--", "...", ".", "?", "!", ",", ":", ";", "'", "`")  # what the COCO evaluation takes away
ABBREVIATIONS = "mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|inc|ltd|co|mt|ft|ave|blvd|approx"
_TOKEN = re.compile(
    rf"""
    https?://\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+           # addresses
    | (?:[a-z]\.){{2,}} | (?:{ABBREVIATIONS})\.(?!\w) | no\.(?=\s*\d)  # u.s., p.m.; mr.
    | '[0-9]0s | (?<!\w)'n'(?!\w)                          # '90s; rock 'n' roll
    | can(?=not\b) | (?:gim|lem)(?=me\b) | (?:gon|wan|got)(?=(?:na|ta)\b)
    | [a-z]+?(?=n't\b) | n't\b | '(?:s|m|d|ll|re|ve)\b     # contractions are two words
    | <[a-z]+> | [#@][a-z]\w*
    | [$£€]?(?<![\w.])\.\d+ | \d+(?:[.,:/]\d+)+            # .5; 1,000; 10:30; 1/2
    | [a-z]+'(?!(?:s|m|d|ll|re|ve|t)\b)[a-z]+ | \w+(?:[-/.&]\w+)*
    | \.{{2,}} | -{{2,}} | [!?]+ | \S
    """,
    re.VERBOSE,
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def coco_words(text: str) -> str:
    """A caption's words as the COCO evaluation counts them, in lower case and a blank between any two.

    As the Penn Treebank's tokenizer splits them (Stanford's, 3.4.1): "a man's" is "a man 's", "isn't" "is n't",
    "t-shirt" one word. Of abbreviations it knows the common ones.
    """
    text = text.lower().translate(str.maketrans('’‘“”"—', "''    "))
    words = (_BRACKETS.get(word, word) for word in _TOKEN.findall(text))
    return " ".join(word for word in words if word not in PUNCTUATION and not word.startswith(("..", "--")))


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """BLEU-1 to BLEU-4 of all the candidates together, each in 0..1.

    An n-gram counts as often as one of its references has it. The brevity penalty compares with the length of
    the closest references, the shorter one where two are. Nothing is smoothed.

    Raises DataError as `cider` does.
    """
    _check(candidates, references)
    right, said = np.zeros(MAX_N), np.zeros(MAX_N)
    length, expected = 0, 0
    for candidate, some in zip(candidates, references, strict=True):
        mine, others = _ngrams(candidate), [_ngrams(text) for text in some]
        words = len(candidate.split())
        length += words
        expected += min((abs(len(text.split()) - words), len(text.split())) for text in some)[1]
        for gram, n in mine.items():
            said[len(gram) - 1] += n
            right[len(gram) - 1] += min(n, max(other[gram] for other in others))
    precision = np.divide(right, said, out=np.zeros(MAX_N), where=said > 0)
    brevity = min(1.0, float(np.exp(1 - expected / length))) if length else 0.0
    return tuple(brevity * float(np.prod(precision[:n]) ** (1 / n)) for n in range(1, MAX_N + 1))


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, np.ndarray]:
    """The mean and each candidate's CIDEr-D: 10 where it is its only reference, 0 where they share nothing.

    An n-gram counts for less the more images have it among their references, and nothing where all have it: so
    a score depends on all references given, and that of a single image is 0.

    Raises DataError where there is no candidate, or one has no reference.
    """
    _check(candidates, references)
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


def _check(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if len(candidates) != len(references) or not len(candidates):
        raise DataError(f"{len(candidates)} candidates, {len(references)} lists of references: expected as many, not 0")
    for i, some in enumerate(references):
        if isinstance(some, str) or not some:
            raise DataError(f"references {i}: {some!r}; expected a list of at least one text")


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
