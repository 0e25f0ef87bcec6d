"""The language model's tokenizer: texts to ids and back, without padding or cutting."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from clip_jax.data.tokenizer import PAD, canonical
from clip_jax.errors import DataError

ASSETS = Path(__file__).parent / "assets"

BOS, EOS = "<|bos|>", "<|eos|>"


class TextTokenizer:
    """Ids of exactly the text: `decode(encode(text))` is the text as the tokenizer normalises it.

    `bos_id` begins a document. Special tokens do not come out of a text.

    Raises DataError where there is no token `bos`.
    """

    def __init__(self, backend: Backend, bos: str = BOS):
        backend.encode_special_tokens = True  # "<|bos|>" in a text is text
        backend.no_padding()
        backend.no_truncation()
        bos_id = backend.token_to_id(bos)
        if bos_id is None:
            raise DataError(f"no token {bos} in the vocabulary")
        self._backend, self.vocab_size, self.bos_id = backend, backend.get_vocab_size(), int(bos_id)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(canonical(self._backend) + "\n")

    def digest(self) -> str:
        """sha256 of the canonical JSON: whether two tokenizers are the same."""
        return hashlib.sha256(canonical(self._backend).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and those beyond the vocabulary, which are Flamingo's own.

        A character cut in its bytes is written U+FFFD.
        """
        return self._backend.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=True)


def open_tokenizer(path: str | Path, bos: str = BOS) -> TextTokenizer:
    """Reads a tokenizer.json, by its path or from the embedded assets.

    Raises DataError, naming the file, where it is missing, is none, or has no token `bos`.
    """
    path = Path(path) if Path(path).exists() else ASSETS / path
    if not path.is_file():
        raise DataError(f"{path}: not found; expected a tokenizer.json")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # what the library raises is a bare Exception
        raise DataError(f"{path}: not a readable tokenizer.json ({str(error).splitlines()[0]})") from None
    try:
        return TextTokenizer(backend, bos)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


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
