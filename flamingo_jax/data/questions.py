"""Questions with short answers about pictures of things: what kind, which colour, which of two kinds.

Answers are balanced, so that a text alone scores no better than chance: every kind and every colour is as often
the right answer as any other, and of two kinds either is, in either place.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = {  # emojibase's groups, in a child's words
    "smileys-emotion": "face",
    "people-body": "person",
    "animals-nature": "nature",
    "food-drink": "food",
    "travel-places": "place",
    "activities": "activity",
    "objects": "object",
    "symbols": "symbol",
    "flags": "flag",
}
KIND_QUESTION = "what kind of thing is this?"
COLOUR_QUESTION = "which colour is this?"

_HUES = ((15, "red"), (40, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (290, "purple"), (345, "pink"))
MIN_SHARE = 0.4  # of what is drawn; below it a picture has no one colour


def which_question(first: str, second: str) -> str:
    return f"is this {first} or {second}?"


def colour_of(r: int, g: int, b: int) -> str:
    """The name of a colour given by 0–255 red, green and blue."""
    hue, saturation, value = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
    if value < 0.25:
        return "black"
    if saturation < 0.18:
        return "grey"
    hue *= 360
    name = next((name for limit, name in _HUES if hue < limit), "red")
    return "brown" if name in ("red", "orange", "yellow") and value < 0.62 else name


# 16 steps a channel are as fine as the names are.
_TABLE = np.array(
    [colour_of(16 * r + 8, 16 * g + 8, 16 * b + 8) for r in range(16) for g in range(16) for b in range(16)]
)


def main_colour(image: np.ndarray) -> str | None:
    """The colour of most of what is drawn on white; None where there is none. `image`: uint8 [S, S, 3]."""
    drawn = image[(image < 240).any(axis=-1)] // 16
    if len(drawn) < image.shape[0] * image.shape[1] // 20:
        return None
    names, counts = np.unique(_TABLE[drawn.astype(np.int32) @ np.array([256, 16, 1])], return_counts=True)
    return str(names[counts.argmax()]) if counts.max() >= MIN_SHARE * len(drawn) else None


@dataclass(frozen=True)
class Asked:
    """A question about a record."""

    record: int
    task: str  # "kind", "colour" or "which"
    question: str
    answer: str


def balanced(classes: Mapping[str, Sequence[int]], count: int, rng: np.random.Generator) -> list[tuple[int, str]]:
    """About `count` (record, class), equally many of every class; the rarest classes are left out where they
    would cost more than a quarter of the questions.
    """
    sizes = sorted((len(records) for records in classes.values()), reverse=True)
    each = [min(size, count // k) for k, size in enumerate(sizes, 1)]
    totals = [k * n for k, n in enumerate(each, 1)]
    k = max(k for k, total in enumerate(totals, 1) if 4 * total >= 3 * max(totals))
    chosen = []
    for name in sorted(classes, key=lambda name: (-len(classes[name]), name))[:k]:
        chosen += [(int(record), name) for record in rng.permutation(classes[name])[: each[k - 1]]]
    return chosen


def ask(groups: Sequence[str], colours: Sequence[str | None], count: int, seed: int) -> list[Asked]:
    """About `count` questions of each task on records of these groups and main colours."""
    rng = np.random.default_rng(seed)
    by_kind: dict[str, list[int]] = {}
    by_colour: dict[str, list[int]] = {}
    for i, (group, colour) in enumerate(zip(groups, colours, strict=True)):
        by_kind.setdefault(KINDS[group], []).append(i)
        if colour is not None:
            by_colour.setdefault(colour, []).append(i)
    asked = [Asked(r, "kind", KIND_QUESTION, kind) for r, kind in balanced(by_kind, count, rng)]
    asked += [Asked(r, "colour", COLOUR_QUESTION, colour) for r, colour in balanced(by_colour, count, rng)]

    # Each kind is wrong beside each other one in turn, first and second in turn.
    chosen = balanced(by_kind, count, rng)
    kinds = sorted({kind for _, kind in chosen})
    for i, (record, kind) in enumerate(chosen):
        others = [other for other in kinds if other != kind] or [kind]
        other = others[i // 2 % len(others)]
        pair = (kind, other) if i % 2 == 0 else (other, kind)
        asked.append(Asked(record, "which", which_question(*pair), kind))
    return asked


def chance(asked: Sequence[Asked]) -> dict[str, float]:
    """What guessing scores in each task: one of the classes asked for, one of two."""
    tasks = sorted({a.task for a in asked})
    return {t: 0.5 if t == "which" else 1 / len({a.answer for a in asked if a.task == t}) for t in tasks}
