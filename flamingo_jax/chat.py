"""A chat in the terminal: lines in, words out as they come, images by their paths, the history kept."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from clip_jax.data.sources import IMAGE_SUFFIXES
from clip_jax.errors import UserError
from flamingo_jax.data.documents import Media
from flamingo_jax.data.prompts import see
from flamingo_jax.data.video import VIDEO_SUFFIXES
from flamingo_jax.speaker import Speaker

HELP = """/image PATH   show an image or a video; or write its path, in quotes if it has blanks, anywhere in a line
/prompt       print all that the model has read
/reset        forget everything
/quit         leave (so does the end of the input)"""
WORD = re.compile(r'"([^"]+)"|\'([^\']+)\'|(\S+)')


class Chat:
    """What was said so far; `write` gets everything that is printed, in pieces."""

    def __init__(self, speaker: Speaker, write: Callable[[str], Any]):
        self._speaker, self._write = speaker, write
        self._reset()

    def _reset(self) -> None:
        self.history, self._shown = self._speaker.begin(), list[Media]()

    def run(self, lines: Iterable[str]) -> None:
        """Reads lines up to /quit or their end. An error that a user can mend is a line; the chat goes on."""
        for line in lines:
            try:
                if not self._take(line.strip()):
                    return
            except UserError as error:
                self._write(f"error: {error}\n")

    def _take(self, line: str) -> bool:
        """Whether the chat goes on."""
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return False
        if command == "/reset":
            self._reset()
        elif command == "/prompt":
            self._write(f"{self.history}\n")
        elif command == "/image" and rest.strip():
            self._show(rest.strip().strip("\"'"))
        elif command.startswith("/") and not Path(command).exists():
            self._write(f"{HELP}\n")
        elif line:
            text, paths = images_in(line)
            for path in paths:
                self._show(path)
            if text:
                self._answer(text)
        return True

    def _show(self, path: str) -> None:
        self._shown.append(see(path, self._speaker.loaded.preprocess))

    def _answer(self, text: str) -> None:
        asked = self.history.user(text, *self._shown)
        # A conversation that grows needs a new program now and then, not with every line.
        shape = self._speaker.shape([asked], multiple=128, images=4)
        answer = self._speaker.say_aloud(asked, shape, self._write)
        self._write("\n")
        self.history, self._shown = asked.said(answer), []


def images_in(line: str) -> tuple[str, list[str]]:
    """A line without the paths of images and videos in it, and these."""
    paths = []

    def take(match: re.Match[str]) -> str:
        word = match[1] or match[2] or match[3].rstrip("?!.,;:")
        if Path(word).suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
            return match[0]
        paths.append(word)
        return match[0][len(word) :] if match[3] else ""

    text = " ".join(WORD.sub(take, line).split())
    return re.sub(r" (?=[?!.,;:])", "", text) if paths else line, paths
