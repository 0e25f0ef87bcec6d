"""Texts that end at a string, which may begin or end inside a token."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]


def truncate(text: str, stop_strings: Sequence[str]) -> str:
    """The text before the first of the strings."""
    return text[: min((at for s in stop_strings if (at := text.find(s)) >= 0), default=len(text))]
