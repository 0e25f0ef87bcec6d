"""Which queries a text holds, all of them in one pass: Aho–Corasick, by pyahocorasick."""

from collections.abc import Sequence

import ahocorasick

from clip_jax.data.curation.texts import is_word_character, normal


class Matcher:
    """Finds queries, given in their normal form, as whole words or, as CLIP's paper has it, as substrings."""

    def __init__(self, queries: Sequence[str], whole_words: bool):
        self._whole_words = whole_words
        self._lengths = [len(query) for query in queries]
        self._automaton = ahocorasick.Automaton(ahocorasick.STORE_INTS)
        for i, query in enumerate(queries):
            self._automaton.add_word(query, i)
        self._automaton.make_automaton()

    def find(self, text: str) -> list[int]:
        """The indices of the queries in a text, which need not be normal, each once, ascending."""
        text = normal(text)
        if not self._whole_words:
            return sorted({i for _, i in self._automaton.iter(text)})
        inside = [is_word_character(c) for c in text] + [False]  # the last stands for what is before and after
        lengths = self._lengths
        return sorted({
            i for end, i in self._automaton.iter(text) if not (inside[end + 1] or inside[end - lengths[i]])
        })  # fmt: skip
