"""Flamingo for several visitors: a thread answers what waits, together, and each hears the own words as they come."""

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from clip_jax.data.transforms import read_image
from clip_jax.errors import ConfigError, UserError
from flamingo_jax.data.documents import Media, Shape
from flamingo_jax.data.prompts import Prompt, see
from flamingo_jax.speaker import Speaker
from launch.demonstration.uploads import Limits

# A prompt that grows needs a new program now and then, not with every word.
TOKENS, IMAGES = 128, 4
MAX_TOKENS, MAX_IMAGES = 1024, 16


class UnheardError(Exception):
    """Nobody listens any more."""


@dataclass(eq=False)
class Request:
    """A prompt that waits for its answer; `heard` gets pieces, then None or what went wrong."""

    prompt: Prompt
    shape: Shape
    stop: tuple[str, ...]
    heard: "queue.SimpleQueue[str | Exception | None]" = field(default_factory=queue.SimpleQueue)
    left: bool = False


class Flamingo:
    """A speaker that many ask. Of what waits, prompts of one shape and end are answered in one batch."""

    def __init__(self, speaker: Speaker, limits: Limits, batch_size: int = 4):
        self.speaker, self.limits, self.batch_size = speaker, limits, batch_size
        self.batches: list[int] = []  # how many were answered together, of the last ones
        self._waiting: list[Request] = []
        self._ready = threading.Condition()
        self._warm_up()
        threading.Thread(target=self._answer_all, name="flamingo", daemon=True).start()

    def begin(self) -> Prompt:
        return self.speaker.begin()

    def see(self, path: str | None) -> Media:
        """An uploaded picture as the model sees it. Raises RecordError for one that is refused."""
        data = self.limits.read(path)
        return see(read_image(data, str(path).rpartition("/")[2]), self.speaker.loaded.preprocess)

    def ask(self, prompt: Prompt, stop: tuple[str, ...] = ()) -> Iterator[str]:
        """The answer so far, again and again, until it is whole. Raises ConfigError for a prompt that is too long."""
        return self._hear(self._wait(prompt, stop))

    def ask_all(self, prompts: Sequence[Prompt], stop: tuple[str, ...] = ()) -> Iterator[tuple[int, str]]:
        """(position, whole answer) of each prompt, in their order."""
        requests = [self._wait(prompt, stop) for prompt in prompts]
        try:
            for i, request in enumerate(requests):
                yield i, "".join([*self._hear(request)][-1:])
        finally:
            for request in requests:
                request.left = True

    def _wait(self, prompt: Prompt, stop: tuple[str, ...]) -> Request:
        shape = self.speaker.shape([prompt], TOKENS, IMAGES)
        if shape.tokens > MAX_TOKENS or shape.images > MAX_IMAGES:
            raise ConfigError(
                f"a prompt of {len(prompt.ids(self.speaker.loaded.tokenizer))} tokens and {len(prompt.media)} images; "
                f"at most {MAX_TOKENS} and {MAX_IMAGES} expected: forget the chat, or take pieces away"
            )
        request = Request(prompt, shape, stop)
        with self._ready:
            self._waiting.append(request)
            self._ready.notify()
        return request

    def _hear(self, request: Request) -> Iterator[str]:
        text = ""
        try:
            while (piece := request.heard.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                text += piece
                yield text
        finally:
            request.left = True

    def _answer_all(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(lambda: self._waiting)
                first = self._waiting[0]
                together = [r for r in self._waiting if (r.shape, r.stop) == (first.shape, first.stop)]
                together = together[: self.batch_size]
                self._waiting = [r for r in self._waiting if r not in together]
            outcome: Exception | None = None
            try:
                if still := [request for request in together if not request.left]:
                    self._answer(still)
            except UnheardError:
                pass
            except UserError as error:
                outcome = error
            except Exception as error:
                logging.exception("an answer failed")
                outcome = error
            for request in together:
                request.heard.put(outcome)

    def _answer(self, requests: list[Request]) -> None:
        self.batches = [*self.batches[-99:], len(requests)]

        def tell(request: Request, piece: str) -> None:
            if all(one.left for one in requests):
                raise UnheardError
            request.heard.put(piece)

        manner = replace(self.speaker.manner, stop=requests[0].stop)
        speaker = self.speaker.but(manner, 1 if len(requests) == 1 else self.batch_size)
        speaker.say_together([r.prompt for r in requests], requests[0].shape, [partial(tell, r) for r in requests])

    def _warm_up(self) -> None:
        """Compiles what visitors would wait for: the shape of short prompts, alone and together."""
        size = self.speaker.loaded.preprocess.image_size
        prompt = self.begin().ask(Media(np.zeros((1, size, size, 3), np.uint8)))
        shape = self.speaker.shape([prompt], TOKENS, IMAGES)
        for batch_size in (1, self.batch_size):
            speaker = self.speaker.but(self.speaker.manner, batch_size)
            speaker.say_together([prompt], shape, [lambda piece: None])
