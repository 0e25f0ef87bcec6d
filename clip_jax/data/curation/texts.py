"""What a text is to a query: its normal form, and where a word begins and ends."""

import functools
import re
import sys
import unicodedata
from collections.abc import Iterator


def normal(text: str) -> str:
    """NFKC, case folded, blanks single: queries and texts alike, so that “Ｃａｆé” is “café”."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def is_word_character(c: str) -> bool:
    """Letters, digits, the underscore and marks: a vowel sign of Devanagari does not end a word."""
    return c.isalnum() or c == "_" or (c > "\x7f" and unicodedata.category(c).startswith("M"))


@functools.cache
def word_pattern() -> re.Pattern[str]:
    """Words, with apostrophes and hyphens inside them."""
    marks = [code for code in range(128, sys.maxunicode + 1) if unicodedata.category(chr(code)).startswith("M")]
    ranges, start = [], marks[0]
    for before, code in zip(marks, [*marks[1:], -1], strict=True):
        if code != before + 1:
            ranges.append(f"{chr(start)}-{chr(before)}")
            start = code
    inner = rf"[\w{''.join(ranges)}]+"
    return re.compile(rf"{inner}(?:['’-]{inner})*")


def words_and_bigrams(text: str) -> Iterator[str]:
    """The words of a normal text, and each with the next, where nothing but a blank is between them."""
    end, last = -1, ""
    for match in word_pattern().finditer(text):
        word = match.group()
        yield word
        if match.start() == end + 1 and text[end] == " ":
            yield f"{last} {word}"
        end, last = match.end(), word
