"""The language model's tokenizer: texts to ids and back, without padding or cutting."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from clip_jax.data.tokenizer import PAD, TokenizerFile
from clip_jax.errors import DataError

ASSETS = Path(__file__).parent / "assets"

BOS, EOS = "<|bos|>", "<|eos|>"


class TextTokenizer(TokenizerFile):
    """Ids of exactly the text: `decode(encode(text))` is the text as the tokenizer normalises it.

    `bos_id` begins a document. Special tokens do not come out of a text.
    """

    def __init__(self, backend: Backend, bos: str = BOS):
        super().__init__(backend)
        backend.no_padding()
        backend.no_truncation()
        self.bos_id = self._special(bos)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens and those beyond the vocabulary, which are Flamingo's own.

        A character cut in its bytes is written U+FFFD.
        """
        return self._backend.decode([int(i) for i in ids if i < self.vocab_size], skip_special_tokens=True)


def open_tokenizer(path: str, bos: str) -> TextTokenizer:
    """Reads a tokenizer.json, by its path or from the embedded assets. Raises DataError as `from_file` does."""
    return TextTokenizer.from_file(path if Path(path).exists() else ASSETS / path, bos=bos)


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
