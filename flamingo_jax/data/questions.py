"""Questions with short answers about pictures of named things: what kind, which colour, which of two.

Answers are balanced, so that a text alone scores no better than chance: every kind and every colour is as often
the right answer as any other, and of two names either is, in either place.
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
MIN_SHARE = 0.5  # of what is drawn; below it a picture has no one colour


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
_TABLE = np.array([colour_of(16 * r + 8, 16 * g + 8, 16 * b + 8) for r in range(16) for g in range(16) for b in range(16)])


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
    """About `count` (record, class), equally many of every class that has enough records for it.

    The rarest classes are left out as long as that allows more questions in all.
    """
    sizes = sorted((len(records) for records in classes.values()), reverse=True)
    each = max((min(size, count // k) * k, min(size, count // k)) for k, size in enumerate(sizes, 1))[1]
    chosen = []
    for name in sorted(name for name, records in classes.items() if len(records) >= each)[: max(1, count // each)]:
        chosen += [(int(record), name) for record in rng.permutation(classes[name])[:each]]
    return chosen


def ask(
    names: Sequence[str], groups: Sequence[str], colours: Sequence[str | None], count: int, seed: int
) -> list[Asked]:
    """About `count` questions of each task on records with these names, groups and main colours."""
    rng = np.random.default_rng(seed)

    def by(keys: Sequence[str | None]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            if key is not None:
                found.setdefault(key, []).append(i)
        return found

    asked = [Asked(r, "kind", KIND_QUESTION, KINDS[group]) for r, group in balanced(by(groups), count, rng)]
    asked += [Asked(r, "colour", COLOUR_QUESTION, colour) for r, colour in balanced(by(colours), count, rng)]

    # Around a circle of the names, each is right once and wrong once, first once and second once.
    records = by(names)
    circle = [str(name) for name in rng.permutation(sorted(records))]
    for turn in range(-(-count // len(circle))):
        for i, name in enumerate(circle[: count - turn * len(circle)]):
            other = circle[(i + 1 + turn) % len(circle)]
            pair = (name, other) if i % 2 == 0 else (other, name)
            asked.append(Asked(int(rng.choice(records[name])), "which", which_question(*pair), name))
    return asked


def chance(asked: Sequence[Asked]) -> dict[str, float]:
    """What guessing scores in each task: one of the classes asked for, one of two."""
    tasks = sorted({a.task for a in asked})
    return {t: 0.5 if t == "which" else 1 / len({a.answer for a in asked if a.task == t}) for t in tasks}
