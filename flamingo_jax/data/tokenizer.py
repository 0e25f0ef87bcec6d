"""The language model's tokenizer: texts to ids and back, without padding or cutting."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from clip_jax.data.tokenizer import PAD, canonical
from clip_jax.errors import ConfigError, DataError

ASSETS = Path(__file__).parent / "assets"

BOS, EOS = "<|bos|>", "<|eos|>"
PADDED = 512


class TextTokenizer:
    """Ids of exactly the text: `decode(encode(text))` is the text as the tokenizer normalises it.

    `bos` begins a document and `pad` fills a row; published tokenizers may have neither. `bos_id` and `pad_id` are
    their ids, of a padding that there is none of 0. Special tokens do not come out of a text, unless asked for.

    Raises DataError where there is no token `bos` or `pad`.
    """

    def __init__(self, backend: Backend, bos: str | None = BOS, pad: str | None = None):
        backend.encode_special_tokens = True  # "<|bos|>" in a text is text
        backend.no_padding()
        backend.no_truncation()
        self._backend, self.bos, self.pad = backend, bos, pad
        self.vocab_size = backend.get_vocab_size()
        self._bos_id = None if bos is None else self.special_id(bos)
        self.pad_id = 0 if pad is None else self.special_id(pad)

    @property
    def bos_id(self) -> int:
        """Raises DataError where documents begin with no token of their own: see `start_ids`."""
        if self._bos_id is None:
            raise DataError("this tokenizer has no token that begins a document")
        return self._bos_id

    @property
    def start_ids(self) -> list[int]:
        """What a document begins with: one id or none."""
        return [] if self._bos_id is None else [self._bos_id]

    def __contains__(self, token: str) -> bool:
        return self._backend.token_to_id(token) is not None

    def special_id(self, token: str) -> int:
        """Raises DataError where there is no such token."""
        index = self._backend.token_to_id(token)
        if index is None:
            raise DataError(f"no token {token} in the vocabulary")
        return int(index)

    def with_tokens(self, tokens: Sequence[str], pad: str | None = None) -> "TextTokenizer":
        """The same with special tokens, those that are new after all others; `pad` then fills a row."""
        backend = Backend.from_str(self._backend.to_str())
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
        return TextTokenizer(backend, self.bos, pad or self.pad)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.canonical() + "\n")

    def canonical(self) -> str:
        """What a tokenizer.json holds, the same for the same tokenizer."""
        return canonical(self._backend)

    def digest(self) -> str:
        """sha256 of the canonical JSON: whether two tokenizers are the same."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def encode(self, text: str, special: bool = False) -> list[int]:
        """`special`: special tokens do come out of the text, wherever their names stand in it."""
        backend = self._marked if special else self._backend
        return backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def _marked(self) -> Backend:
        backend = Backend.from_str(self._backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and those beyond the vocabulary, which are Flamingo's own.

        A character cut in its bytes is written U+FFFD.
        """
        return self._backend.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=True)


def open_tokenizer(path: str | Path, bos: str | None = BOS, pad: str | None = None) -> TextTokenizer:
    """Reads a tokenizer.json, by its path or from the embedded assets.

    Raises DataError, naming the file, where it is missing, is none, or has no token `bos` or `pad`.
    """
    path = given if (given := Path(path)).exists() else ASSETS / path
    if not path.is_file():
        raise DataError(f"{given}: not found; expected a tokenizer.json")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # what the library raises is a bare Exception
        raise DataError(f"{path}: not a readable tokenizer.json ({str(error).splitlines()[0]})") from None
    try:
        return TextTokenizer(backend, bos, pad)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def check_vocabulary(tokenizer: TextTokenizer, name: str, vocab_size: int) -> None:
    """Raises ConfigError where a tokenizer's ids are not the language model's.

    Published tables of embeddings are often padded, to a multiple of PADDED at most, by rows that no token uses.
    """
    if not vocab_size - PADDED < tokenizer.vocab_size <= vocab_size:
        raise ConfigError(f"{name} has {tokenizer.vocab_size} ids; the language model expects {vocab_size}")


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """A lower-cased byte-level BPE of exactly `vocab_size` ids, every digit one of them; no unknown token.

    Raises DataError where the texts do not hold enough pairs to merge for so many ids.
    """
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise DataError(f"these texts give {backend.get_vocab_size()} ids at most; expected {vocab_size}")
    return TextTokenizer(backend)
