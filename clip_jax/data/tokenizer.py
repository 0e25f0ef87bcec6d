"""Texts to token ids, by the `tokenizers` library. Dimension letters: B texts, L context length."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from clip_jax.errors import ConfigError, DataError

PAD, START, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>"


class TokenizerFile:
    """What every tokenizer here is: a tokenizer.json that can be read, written and told from another."""

    def __init__(self, backend: Backend):
        self._backend = backend
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self.vocab_size = backend.get_vocab_size()

    @classmethod
    def from_file(cls, path: str | Path, **names: str) -> Self:
        """Reads a tokenizer.json; `names` are those of special tokens, where the class asks for any.

        Raises DataError, naming the file, where it is missing or is none.
        """
        if not Path(path).is_file():
            raise DataError(f"{path}: not found; expected a tokenizer.json")
        try:
            return cls(Backend.from_file(str(path)), **names)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        except Exception as error:  # what the library raises is a bare Exception
            raise DataError(f"{path}: not a readable tokenizer.json ({str(error).splitlines()[0]})") from None

    def save(self, path: str | Path) -> None:
        Path(path).write_text(canonical(self._backend) + "\n")

    def digest(self) -> str:
        """sha256 of the canonical JSON: whether two tokenizers are the same."""
        return hashlib.sha256(canonical(self._backend).encode()).hexdigest()

    def _special(self, token: str) -> int:
        index = self._backend.token_to_id(token)
        if index is None:
            raise DataError(f"no token {token} in the vocabulary")
        return index


class Tokenizer(TokenizerFile):
    """Start token, ids, end token, padding. The padding is id 0 and the end the highest id, so that both
    OpenAI's rule (pool at the highest id) and a search for the end token find the same place.
    """

    def __init__(self, backend: Backend):
        super().__init__(backend)
        self.pad_id, self.start_id, self.end_id = (self._special(token) for token in (PAD, START, END))

    def __call__(self, texts: str | Sequence[str], context_length: int) -> np.ndarray:
        """[B, L] int32. A text that is too long is cut; its end token stays.

        Raises ConfigError where not even the start and the end token fit.
        """
        if context_length < 2:
            raise ConfigError(f"context_length {context_length}: at least 2 expected, for the start and the end token")
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = np.full((len(texts), context_length), self.pad_id, np.int32)
        for row, encoding in zip(ids, self._backend.encode_batch([clean(t) for t in texts]), strict=True):
            tokens = [self.start_id, *encoding.ids[: context_length - 2], self.end_id]
            row[: len(tokens)] = tokens
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the special tokens."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True).strip()


def canonical(backend: Backend) -> str:
    """A tokenizer's JSON, the same for the same tokenizer."""
    return json.dumps(json.loads(backend.to_str()), ensure_ascii=False, sort_keys=True, indent=0)


def clean(text: str) -> str:
    """Without blanks at the ends, one blank between words."""
    return " ".join(text.split())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lower-cased byte-level BPE of exactly `vocab_size` ids; there is no unknown token.

    Raises DataError where the texts do not hold enough pairs to merge for so many ids.
    """
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        special_tokens=[PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((clean(text) for text in texts), trainer)
    if backend.get_vocab_size() != vocab_size - 2:
        raise DataError(f"these texts give {backend.get_vocab_size() + 2} ids at most; expected {vocab_size}")
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in (START, END)])
    return Tokenizer(backend)
