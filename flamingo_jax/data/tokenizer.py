"""The language model's tokenizer: texts to ids and back, without padding or cutting."""

from collections.abc import Iterable

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from clip_jax.data.tokenizer import PAD, TokenizerFile
from clip_jax.errors import DataError

BOS, EOS = "<|bos|>", "<|eos|>"


class TextTokenizer(TokenizerFile):
    """Ids of exactly the text: `decode(encode(text))` is the text as the tokenizer normalises it.

    `pad_id` is 0; `bos_id` begins and `eos_id` ends a document. None of the three comes out of a text.
    """

    def __init__(self, backend: Backend):
        super().__init__(backend)
        self.pad_id, self.bos_id, self.eos_id = (self._special(token) for token in (PAD, BOS, EOS))

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the special tokens. A character cut in its bytes is written U+FFFD."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


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
