"""How a task is put to Flamingo in words, and in shots (arXiv 2204.14198, appendix C.2)."""

from collections.abc import Sequence
from dataclasses import dataclass

from flamingo_jax.data.documents import END, Document, Media, Part, Text

CAPTION = "Output:"


@dataclass(frozen=True)
class Shot:
    """An image or clip, the prompt that stands after it, and what should come then."""

    media: Media | None
    prompt: str
    answer: str

    def parts(self, *, learned: bool = True) -> list[Part]:
        """The whole chunk; the prompt itself is not learned."""
        parts: list[Part] = [] if self.media is None else [self.media]
        return [*parts, Text(self.prompt, learned=False), Text(" " + self.answer, learned), END]

    def question(self) -> list[Part]:
        """The chunk up to where the answer begins."""
        return [part for part in self.parts() if part is not END][:-1]

    def without_media(self) -> "Shot":
        return Shot(None, self.prompt, self.answer)


def question(text: str) -> str:
    return f"Question: {text} Answer:"


def few_shot(shots: Sequence[Shot], query: Shot) -> Document:
    """A prompt: the shots with their answers, then the query without its own."""
    return Document([*(part for shot in shots for part in shot.parts()), *query.question()])
