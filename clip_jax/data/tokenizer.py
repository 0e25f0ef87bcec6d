"""Texts to token ids, by the `tokenizers` and `sentencepiece` libraries.

Dimension letters: B texts, W windows of a text, L context length.
"""

import gzip
import hashlib
import html
import json
import re
import string
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from clip_jax.data.sources import ASSETS, find_asset
from clip_jax.errors import ConfigError, DataError, RecordError

PAD, START, END = "<|pad|>", "<|startoftext|>", "<|endoftext|>"
MAX_CHARACTERS = 1_000_000  # a longer text is refused: it is no caption, and cleaning it takes minutes
FILES = ("tokenizer.json", "spiece.model", "vocab.txt")  # what `load_tokenizer` looks for, in this order


class Pieces(Protocol):
    """A vocabulary: texts to ids without special tokens, and back."""

    vocab_size: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def canonical(self) -> str: ...


class Tokenizer:
    """Start token (where there is one), ids, end token, padding.

    Where the padding is id 0 and the end the highest id (OpenAI's and our own), OpenAI's rule (pool at the
    highest id) and a search for the end token find the same place.

    `truncated` counts the texts that have been cut. `context_length` is the length used where a call names none.
    """

    def __init__(
        self,
        pieces: Pieces,
        *,
        start_id: int | None,
        end_id: int,
        pad_id: int,
        clean: Callable[[str], str],
        context_length: int | None = None,
    ):
        self._pieces, self._clean = pieces, clean
        self.start_id, self.end_id, self.pad_id = start_id, end_id, pad_id
        self.vocab_size, self.context_length = pieces.vocab_size, context_length
        self.truncated = 0

    def __call__(
        self,
        texts: str | Sequence[str],
        context_length: int | None = None,
        overflow: Literal["truncate", "error"] = "truncate",
    ) -> np.ndarray:
        """[B, L] int32. A text that is too long is cut and counted, its end token stays; or it is an error.

        Raises RecordError for a text that is too long (`overflow="error"`), huge or no valid Unicode; ConfigError
        where not even the special tokens fit.
        """
        length, room = self._room(context_length)
        encoded = self._encode(texts)
        for i, ids in enumerate(encoded):
            if len(ids) > room:
                if overflow == "error":
                    raise RecordError(f"text {i}: {len(ids)} tokens; at most {room} fit in context_length {length}")
                self.truncated += 1
        return self._rows([ids[:room] for ids in encoded], length)

    def windows(self, texts: str | Sequence[str], context_length: int | None = None) -> list[np.ndarray]:
        """For each text its consecutive windows [W, L] int32, each with its special tokens; nothing is cut.

        One window for a text that fits. The caller averages what a model makes of them. Raises as a call does.
        """
        length, room = self._room(context_length)
        return [
            self._rows([ids[i : i + room] for i in range(0, max(len(ids), 1), room)], length)
            for ids in self._encode(texts)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a row, without its special tokens and what follows the end."""
        kept = [int(i) for i in ids]
        if self.end_id in kept:
            kept = kept[: kept.index(self.end_id)]
        return self._pieces.decode([i for i in kept if i != self.start_id]).strip()

    def save(self, path: str | Path) -> None:
        """Writes a tokenizer.json. Raises ConfigError where one could not say all that this tokenizer does."""
        if self._clean not in (clean, str):
            raise ConfigError(f"{path}: this tokenizer cleans texts by {self._clean.__name__}, which no file can hold")
        Path(path).write_text(self._pieces.canonical() + "\n")

    def digest(self) -> str:
        """sha256 of the vocabulary's canonical form: whether two tokenizers are the same."""
        return hashlib.sha256(self._pieces.canonical().encode()).hexdigest()

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer.json, our own or Hugging Face's.

        Where the file itself places special tokens (Hugging Face's do), its rules are followed, but for special
        tokens that stand in a text: those are text. Raises DataError, naming the file, where it is missing or
        is none.
        """
        if not Path(path).is_file():
            raise DataError(f"{path}: not found; expected a tokenizer.json")
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # what the library raises is a bare Exception
            raise DataError(f"{path}: not a readable tokenizer.json ({str(error).splitlines()[0]})") from None
        backend.no_truncation()
        padding = backend.padding
        backend.no_padding()
        placed = backend.encode("").ids
        if not placed:
            return _with_own_specials(backend, str(path))
        if len(placed) > 2:
            raise DataError(f"{path}: {len(placed)} special tokens around a text; expected an end and at most a start")
        settings = read_settings(Path(path))
        pad = content_of(settings.get("pad_token"))
        if padding:
            pad_id = padding["pad_id"]
        elif pad:
            pad_id = special_id(backend, pad, str(path))
        else:
            pad_id = 0
        return cls(
            _Json(backend),
            start_id=placed[0] if len(placed) == 2 else None,
            end_id=placed[-1],
            pad_id=pad_id,
            clean=str,
            context_length=_context_length(settings),
        )

    def _room(self, context_length: int | None) -> tuple[int, int]:
        length = self.context_length if context_length is None else context_length
        specials = 1 if self.start_id is None else 2
        if length is None:
            raise ConfigError("context_length is missing: this tokenizer has none of its own")
        if length < specials:
            what = "the end token" if self.start_id is None else "the start and the end token"
            raise ConfigError(f"context_length {length}: at least {specials} expected, for {what}")
        return length, length - specials

    def _encode(self, texts: str | Sequence[str]) -> list[list[int]]:
        texts = [texts] if isinstance(texts, str) else list(texts)
        return self._pieces.encode([self._valid(i, text) for i, text in enumerate(texts)])

    def _valid(self, i: int, text: str) -> str:
        if len(text) > MAX_CHARACTERS:
            raise RecordError(
                f"text {i}: {len(text):,} characters; at most {MAX_CHARACTERS:,} expected", reason="long_caption"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:  # what bytes that are no UTF-8 leave in a file name or an argument
            raise RecordError(f"text {i}: not valid UTF-8 (character {error.start} is half a character)") from None
        return self._clean(text)

    def _rows(self, texts: Sequence[list[int]], length: int) -> np.ndarray:
        rows = np.full((len(texts), length), self.pad_id, np.int32)
        start = [] if self.start_id is None else [self.start_id]
        for row, ids in zip(rows, texts, strict=True):
            row[: len(start) + len(ids) + 1] = [*start, *ids, self.end_id]
        return rows


class _Json:
    """A vocabulary of the `tokenizers` library."""

    def __init__(self, backend: Backend):
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self._backend, self.vocab_size = backend, backend.get_vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def canonical(self) -> str:
        return canonical(self._backend)


def canonical(backend: Backend) -> str:
    """A tokenizer's JSON, the same for the same tokenizer."""
    return json.dumps(json.loads(backend.to_str()), ensure_ascii=False, sort_keys=True, indent=0)


class _SentencePiece:
    """A vocabulary of the `sentencepiece` library."""

    def __init__(self, model: bytes):
        import sentencepiece

        self._model, self._processor = model, sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.get_piece_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode(ids)

    def canonical(self) -> str:
        return self._model.hex()

    def special(self, token: str, path: Path) -> int:
        index = self._processor.piece_to_id(token)
        if self._processor.id_to_piece(index) != token:
            raise DataError(f"{path}: no token {token} in the vocabulary")
        return index


def clean(text: str) -> str:
    """Without blanks at the ends, one blank between words."""
    return " ".join(text.split())


def clean_openai(text: str) -> str:
    """OpenAI's cleaning: mended encoding (ftfy), HTML unescaped twice, single blanks, lower case."""
    import ftfy

    if text.isascii() and text.isprintable() and "&" not in text:  # neither of them changes that, and both take long
        return clean(text).lower()
    return clean(html.unescape(html.unescape(ftfy.fix_text(text)))).lower()


def clean_siglip(text: str) -> str:
    """SigLIP's cleaning: lower case, no ASCII punctuation, single blanks (as Hugging Face's SiglipTokenizer)."""
    return clean(re.sub(f"[{re.escape(string.punctuation)}]", "", text.lower()))


def openai_tokenizer(context_length: int = 77) -> Tokenizer:
    """OpenAI's lower-cased byte-pair encoding of 49,408 ids (github.com/openai/CLIP, clip/simple_tokenizer.py)."""
    lines = gzip.decompress((ASSETS / "openai" / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = [(first, second) for first, second in (line.split() for line in lines[1 : 49152 - 256 - 2 + 1])]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # Every byte has a character that can be seen: its own or, in the order of the bytes, one from U+0100 on.
    characters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    words = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), START, END]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    pattern = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.Replace("</w>", "Ġ"), decoders.ByteLevel()])  # Ġ: a blank's byte
    return Tokenizer(
        _Json(backend),
        start_id=vocabulary[START],
        end_id=vocabulary[END],
        pad_id=0,
        clean=clean_openai,
        context_length=context_length,
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer by its file, by the directory that holds it, or by name: "openai" is `openai_tokenizer()`.

    Known are tokenizer.json (our own; CLIP's and SigLIP's of Hugging Face), spiece.model (SigLIP's SentencePiece;
    needs the extra `siglip`) and vocab.txt (BERT's WordPiece), in this order where a directory holds several. A
    tokenizer_config.json beside it gives the padding token, the context length and, for BERT, the case.

    Raises DataError, naming the file, where it is missing, unreadable or lacks a special token.
    """
    if str(path) == "openai":
        return openai_tokenizer()
    path = find_asset(str(path))
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise DataError(f"{path}: no tokenizer there; expected one of {', '.join(FILES)}")
        path = found[0]
    if path.suffix == ".model":
        return _load_sentencepiece(path)
    if path.suffix == ".txt":
        return _load_wordpiece(path)
    return Tokenizer.from_file(path)


def _load_sentencepiece(path: Path) -> Tokenizer:
    try:
        pieces = _SentencePiece(path.read_bytes())
    except ImportError:
        raise DataError(f"{path}: a SentencePiece model; reading it needs the extra `siglip`") from None
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable SentencePiece model ({str(error).splitlines()[0]})") from None
    settings = read_settings(path)
    end = pieces.special("</s>", path)
    pad = pieces.special(content_of(settings.get("pad_token")) or "</s>", path)
    length = _context_length(settings) or 64
    return Tokenizer(pieces, start_id=None, end_id=end, pad_id=pad, clean=clean_siglip, context_length=length)


def _load_wordpiece(path: Path) -> Tokenizer:
    settings = read_settings(path)
    try:
        backend = Backend(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
    except Exception as error:  # what the library raises is a bare Exception
        raise DataError(f"{path}: not a readable vocabulary ({str(error).splitlines()[0]})") from None
    backend.normalizer = normalizers.BertNormalizer(lowercase=bool(settings.get("do_lower_case", True)))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    start, end, pad, _ = (special_id(backend, token, str(path)) for token in ("[CLS]", "[SEP]", "[PAD]", "[UNK]"))
    backend.post_processor = processors.BertProcessing(("[SEP]", end), ("[CLS]", start))
    length = _context_length(settings) or 512
    return Tokenizer(_Json(backend), start_id=start, end_id=end, pad_id=pad, clean=str, context_length=length)


def read_settings(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a file; empty where there is none."""
    beside = path.with_name("tokenizer_config.json")
    if not beside.is_file():
        return {}
    try:
        settings = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{beside}: not readable as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise DataError(f"{beside}: expected a JSON object")
    return settings


def content_of(token: Any) -> str | None:
    """Hugging Face writes a token as a string or as an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _context_length(settings: dict[str, Any]) -> int | None:
    length = settings.get("model_max_length")
    return length if isinstance(length, int) and 0 < length < 1_000_000 else None  # 10^30 stands for none


def special_id(backend: Backend, token: str, path: str) -> int:
    index = backend.token_to_id(token)
    if index is None:
        raise DataError(f"{path}: no token {token} in the vocabulary")
    return index


def _with_own_specials(backend: Backend, path: str) -> Tokenizer:
    pad, start, end = (special_id(backend, token, path) for token in (PAD, START, END))
    return Tokenizer(_Json(backend), start_id=start, end_id=end, pad_id=pad, clean=clean)


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
    return _with_own_specials(backend, "the trained tokenizer")
