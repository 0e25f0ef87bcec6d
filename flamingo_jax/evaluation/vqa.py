"""Answers to questions about images: VQA accuracy (arXiv 1505.00468) after the official normalisation, exact match."""

import re
from collections.abc import Sequence

import numpy as np

from clip_jax.errors import DataError

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
ARTICLES = ("a", "an", "the")
# Each is also written with one of its apostrophes left out. The one that is not restored but taken away,
# "somebody'd", is the official table's.
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[: match.start()] + word[match.end() :]: word for word in CONTRACTED.split() for match in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}


def normalise(answer: str) -> str:
    """An answer as the official evaluation compares it: lower case, digits for number words, no articles and no
    punctuation, apostrophes put into contractions.

    Punctuation becomes a blank, and nothing where it stands beside a blank, or anywhere in an answer that has a
    comma between digits.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    digits = re.search(r"\d,\d", answer)
    cleaned = answer
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if beside_blank or digits else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (DIGITS.get(word, word) for word in cleaned.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def first_answer(generation: str) -> str:
    """What a model says before it goes on with another question or answer, or lists another after a comma."""
    return re.split("Question|Answer|Short", generation, maxsplit=1)[0].split(", ")[0]


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> np.ndarray:
    """Each prediction's accuracy, [N] in 0..1; VQAv2 has ten people's answers to each question.

    Right in full is what three others say: min(1, matches / 3), averaged over leaving each of the people out.
    Answers and predictions are always normalised; the official script leaves them as they are where all agree.

    Raises DataError where the numbers differ, or a question has fewer than two answers.
    """
    _check_lengths(predictions, answers)
    accuracy = np.zeros(len(predictions))
    for i, (prediction, some) in enumerate(zip(predictions, answers, strict=True)):
        if isinstance(some, str) or len(some) < 2:
            raise DataError(
                f"answers {i}: {some!r}; expected a list of at least two, one of which is left out at a time"
            )
        said = normalise(prediction)
        match = np.array([normalise(answer) == said for answer in some], int)
        accuracy[i] = np.minimum(1, (match.sum() - match) / 3).mean()
    return accuracy


def exact_match(predictions: Sequence[str], answers: Sequence[str | Sequence[str]]) -> np.ndarray:
    """[N] of 0 and 1: whether a prediction is the right answer, or one of several, after normalisation.

    Raises DataError where the numbers differ.
    """
    _check_lengths(predictions, answers)
    right = ([some] if isinstance(some, str) else some for some in answers)
    return np.array(
        [normalise(p) in {normalise(a) for a in some} for p, some in zip(predictions, right, strict=True)], float
    )


def _check_lengths(predictions: Sequence[str], answers: Sequence[object]) -> None:
    if len(predictions) != len(answers):
        raise DataError(f"{len(predictions)} predictions and the answers of {len(answers)} questions: expected as many")
