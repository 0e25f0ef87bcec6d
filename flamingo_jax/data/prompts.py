"""How a task is put to a Flamingo in words, in shots and in the turns of a chat, as each family was trained to read it.

Sources: arXiv 2204.14198, appendix C.2; open_flamingo, eval/models (`get_caption_prompt`, `get_vqa_prompt`);
transformers, models/idefics/processing_idefics.py; the templates of IDEFICS's own evaluation and its model card.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from clip_jax.data.pipeline import Element
from clip_jax.data.preprocess import Preprocess
from clip_jax.errors import ConfigError, RecordError
from flamingo_jax.data.conventions import SPECIAL_TOKENS, Convention
from flamingo_jax.data.documents import END, IMAGE_TAG, Document, EndOfChunk, Media, Part, Shape, Text, stack_frames
from flamingo_jax.data.tokenizer import TextTokenizer
from flamingo_jax.data.video import VIDEO_SUFFIXES, read_frames

CAPTION = "Output:"


@dataclass(frozen=True)
class Shot:
    """An image or clip, the prompt that stands after it, and what should come then.

    `before` stands before the image (without one, a blank follows it), `between` before the answer.
    """

    media: Media | None
    prompt: str
    answer: str
    before: str = ""
    between: str = " "

    def parts(self, *, learned: bool = True) -> list[Part]:
        """The whole chunk; the prompt itself is not learned."""
        parts: list[Part] = [] if self.media is None else [self.media]
        if self.before:
            parts = [Text(self.before if parts else self.before + " ", learned=False), *parts]
        return [*parts, Text(self.prompt, learned=False), Text(self.between + self.answer, learned), END]

    def question(self) -> list[Part]:
        """The chunk up to where the answer begins."""
        return [part for part in self.parts() if part is not END][:-1]

    def without_media(self) -> "Shot":
        return replace(self, media=None)


def question(text: str) -> str:
    return f"Question: {text} Answer:"


def few_shot(shots: Sequence[Shot], query: Shot) -> Document:
    """A prompt: the shots with their answers, then the query without its own."""
    return Document([*(part for shot in shots for part in shot.parts()), *query.question()])


class Template(NamedTuple):
    """What stands before an image and after it, "{}" for what is asked, and what ends an answer that no token ends."""

    before: str
    after: str
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grammar:
    """What a family writes: `around` every image (neighbours share one), for each task, before an answer and after."""

    caption: Template
    question: Template
    turn: Template  # of a chat
    end: str
    around: str = ""
    between: str = " "


_TURN_END = SPECIAL_TOKENS["idefics"]["turn"]
_TURN = f"{_TURN_END}\nAssistant:"
GRAMMARS = {
    "flamingo": Grammar(
        Template("", CAPTION), Template("", question("{}")), Template("", question("{}")), end="<EOC>"
    ),
    "open_flamingo": Grammar(
        Template("", CAPTION), Template("", "Question:{} Short answer:"), Template("", "Question:{} Answer:"),
        end=SPECIAL_TOKENS["open_flamingo"]["end"], between="",
    ),
    "idefics": Grammar(
        Template("", CAPTION, ("\n",)), Template("", question("{}"), ("\n",)),
        Template("User:", "{}\nAssistant:", ("\nUser:",)),
        end="\n", around=SPECIAL_TOKENS["idefics"]["around"],
    ),
    "idefics instruct": Grammar(
        Template("User:", f"Describe the image briefly.{_TURN}"), Template("User:", "{}" + _TURN),
        Template("User:", "{}" + _TURN), end=f"{_TURN_END}\n", around=SPECIAL_TOKENS["idefics"]["around"],
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A prompt as it grows: every method gives a longer one, `str` the text that it stands for.

        prompt = begin(convention).shot(dog, "a dog").shot(cat, "a cat").ask(image)
        chat = begin(convention).user("What is this?", image).reply("A cat.").user("What colour?")

    Texts are what a user types. Raises ConfigError where one holds a tag (an image is given as an image), and for a
    clip where a family sees single images only.
    """

    convention: Convention
    grammar: Grammar
    parts: tuple[Part, ...] = ()

    @property
    def media(self) -> list[Media]:
        return Document(self.parts).media

    def text(self, text: str) -> "Prompt":
        """Words, as they are."""
        return self._with(Text(self._typed(text)))

    def image(self, media: Media) -> "Prompt":
        """An image or a clip."""
        return self._with(media)

    def template(self, text: str, media: Sequence[Media]) -> "Prompt":
        """A text with `<image>` wherever one of the images or clips belongs.

        Raises ConfigError where there are more or fewer of them than places.
        """
        first, *rest = text.split(IMAGE_TAG)
        if len(rest) != len(media):
            raise ConfigError(f"{len(media)} images for {len(rest)} places {IMAGE_TAG} in the prompt {text[:60]!r}")
        prompt = self.text(first) if first else self
        for image, after in zip(media, rest, strict=True):
            prompt = prompt.image(image).text(after) if after else prompt.image(image)
        return prompt

    def shot(self, media: Media | None, answer: str, question: str | None = None) -> "Prompt":
        """An image with its caption or, where a question is given, with the answer to it."""
        return self._with(*self._shot(media, question, answer).parts())

    def ask(self, media: Media | None, question: str | None = None) -> "Prompt":
        """The same up to where the caption or answer begins, which is what the model goes on with."""
        return self._with(*self._shot(media, question, "").question())

    def user(self, text: str, *media: Media) -> "Prompt":
        """A user's turn in a chat, up to where the reply begins. Images stand before the text."""
        before, after, _ = self.grammar.turn
        opening = [Text(before if media else before + " ")] if before else []
        return self._with(*opening, *media, Text(after.replace("{}", self._typed(text.strip()))))

    def answered(self, text: str) -> "Prompt":
        """With the beginning of an answer."""
        return self._with(Text(self.grammar.between + self._typed(text.strip())))

    def reply(self, text: str) -> "Prompt":
        """With the whole answer, and its end."""
        return self.answered(text)._with(END)

    def said(self, text: str) -> "Prompt":
        """`reply` of what a model said, up to where it writes a tag itself."""
        return self.reply(before_tags(text, self._tags))

    @property
    def _tags(self) -> list[str]:
        return sorted({IMAGE_TAG, *SPECIAL_TOKENS[self.convention.family].values()})

    def __str__(self) -> str:
        text, around = "", self.grammar.around
        for part in self.parts:
            if isinstance(part, Text):
                text += part.text
            elif isinstance(part, EndOfChunk):
                text += self.grammar.end
            else:
                text += (
                    IMAGE_TAG + around if around and text.endswith(IMAGE_TAG + around) else around + IMAGE_TAG + around
                )
        return text

    def ids(self, tokenizer: TextTokenizer) -> list[int]:
        """The tokens, with the one that begins a document.

        Raises ConfigError where the tokenizer does not know the family's image token.
        """
        convention = self.convention
        if convention.family == "idefics":  # its processor writes the token that begins a document into the text
            ids = tokenizer.encode((tokenizer.bos or "") + str(self), special=True)
        elif convention.family == "open_flamingo":
            ids = tokenizer.start_ids + tokenizer.encode(str(self), special=True)
        else:  # its tag is plain text, and <EOC> is no word of the tokenizer's
            ids = tokenizer.start_ids
            for part in self.parts:
                if isinstance(part, Text):
                    ids += tokenizer.encode(part.text)
                else:
                    ids += convention.image if isinstance(part, Media) else [convention.end_id]
        row = np.array([ids])
        if (tags := int(convention.places(row, np.ones_like(row, bool)).sum())) != len(self.media):
            raise ConfigError(f"{tags} image tags among the tokens of a prompt with {len(self.media)} images")
        return ids

    def _shot(self, media: Media | None, question: str | None, answer: str) -> Shot:
        grammar = self.grammar
        before, after, _ = grammar.caption if question is None else grammar.question
        prompt = after if question is None else after.replace("{}", self._typed(question.strip()))
        return Shot(media, prompt, self._typed(answer.strip()), before, grammar.between)

    def _with(self, *parts: Part) -> "Prompt":
        for part in parts:
            if isinstance(part, Media) and len(part.frames) > 1 and self.convention.family != "flamingo":
                raise ConfigError(f"a clip of {len(part.frames)} frames: {self.convention.family} sees single images")
        return replace(self, parts=(*self.parts, *parts))

    def _typed(self, text: str) -> str:
        for tag in self._tags:
            if tag in text:
                raise ConfigError(f"the text {text[:60]!r} holds {tag}, which only the prompt itself may write")
        return text


def before_tags(text: str, tags: Sequence[str] = (IMAGE_TAG,)) -> str:
    """What counts of what a model said: where it writes a tag, which only a prompt may, it goes on with its own."""
    return re.split("|".join(map(re.escape, tags)), text, maxsplit=1)[0]


def begin(convention: Convention, caption: str | None = None, question: str | None = None) -> Prompt:
    """An empty prompt in the family's own words, or with others for what follows an image ("{}": the question).

    Raises ConfigError for a question without one "{}".
    """
    family = convention.family
    grammar = GRAMMARS[family if convention.turn_id is None else f"{family} instruct"]
    if caption is not None:
        grammar = replace(grammar, caption=grammar.caption._replace(after=caption))
    if question is not None:
        if question.count("{}") != 1:
            raise ConfigError(f"the prompt {question!r}: one {{}} expected, where the question stands")
        grammar = replace(grammar, question=grammar.question._replace(after=question))
    return Prompt(convention, grammar)


def see(
    source: Image.Image | str | Path | bytes | Sequence[Image.Image | str | Path], preprocess: Preprocess, key: str = ""
) -> Media:
    """An image by its path, its bytes or as it is, or the frames of a clip, as a model of this preprocessing sees it.

    What is named (by `key`, where that is given) as a video file is one: its first 8 seconds, a frame of each.

    Raises RecordError, which names it, for one that is missing, corrupt, empty, too large or too short.
    """
    if isinstance(source, str | Path | bytes):
        name = key or ("" if isinstance(source, bytes) else source)
        if Path(name).suffix.lower() in VIDEO_SUFFIXES:
            source = read_frames(source, key=key)
    frames = [source] if isinstance(source, Image.Image | str | Path | bytes) else source
    return Media(np.stack([preprocess.pixels(frame, key) for frame in frames]))


def shape_of(
    prompts: Sequence[Prompt], tokenizer: TextTokenizer, image_size: int, tokens: int = 16, images: int = 1
) -> Shape:
    """Room for all of these prompts, numbers of tokens and images rounded up to multiples of `tokens` and `images`:
    so that other prompts fit the same program.
    """
    length = max(len(prompt.ids(tokenizer)) for prompt in prompts)
    shown = max(1, *(len(prompt.media) for prompt in prompts))
    frames = max([1, *(len(media.frames) for prompt in prompts for media in prompt.media)])
    return Shape(-(-shown // images) * images, frames, image_size, -(-length // tokens) * tokens)


def encode_prompts(prompts: Sequence[Prompt], tokenizer: TextTokenizer, shape: Shape) -> Element:
    """Prompts of one family as the model's arrays, padded on the left.

    Returns:
      media uint8 [B, T, F, S, S, 3], frame_mask bool [B, T, F], text int32 [B, L], text_mask bool [B, L],
      media_mask bool [B, L, T].

    Raises RecordError for a prompt of more images, frames or tokens than `shape` has room for.
    """
    B, T, S, L = len(prompts), shape.images, shape.image_size, shape.tokens
    convention = prompts[0].convention
    text, text_mask = np.full((B, L), convention.pad_id, np.int32), np.zeros((B, L), bool)
    seen = []
    for i, prompt in enumerate(prompts):
        ids, frames = prompt.ids(tokenizer), [media.frames for media in prompt.media]
        if len(ids) > L or len(frames) > T:
            raise RecordError(f"prompt {i}: {len(ids)} tokens and {len(frames)} images; at most {L} and {T} expected")
        text[i, L - len(ids) :], text_mask[i, L - len(ids) :] = ids, True
        seen.append(stack_frames(frames, shape, (S, S, 3), np.uint8, key=f"prompt {i}"))
    media, frame_mask = map(np.stack, zip(*seen, strict=True))
    media_mask = convention.media_mask(text, text_mask, T)
    return dict(media=media, frame_mask=frame_mask, text=text, text_mask=text_mask, media_mask=media_mask)
