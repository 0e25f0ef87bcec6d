"""The tokenizers of published language models, from their directories.

tokenizer.json is read as it is. A SentencePiece model (tokenizer.model; needs the extra `siglip`) and GPT-2's
vocab.json with merges.txt are put into the same library, as transformers does (convert_slow_tokenizer.py).
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from clip_jax.data.tokenizer import content_of, read_settings
from clip_jax.errors import DataError
from clip_jax.interop.tensors import read_json
from flamingo_jax.data.tokenizer import TextTokenizer

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # what is looked for, in this order
CONTROL, UNKNOWN = 3, 2  # types of a SentencePiece
BPE = 2  # a type of model
BLANK = "▁"


def read_tokenizer(path: str | Path, begins: bool | None = None) -> TextTokenizer:
    """A tokenizer by its file or by the directory that holds it.

    Args:
      begins: whether documents begin with its `bos_token`; None: what tokenizer.json does, or else what
        tokenizer_config.json says. That and special_tokens_map.json also say what fills a row.

    Raises DataError, naming the file, where it is missing or unreadable, or lacks a token that it names.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            there = f"{path}: no tokenizer there ({', '.join(FILES)})"
            raise DataError(f"{there}; name one: tokenizer=PATH or --tokenizer PATH")
        path = found[0]
    if not path.is_file():
        raise DataError(f"{path}: not found; expected one of {', '.join(FILES)}")
    try:
        backend, settings = _read(path), _settings(path)
        _add_tokens(backend, path.with_name("added_tokens.json"))
    except DataError:
        raise
    except ImportError:
        raise DataError(f"{path}: a SentencePiece model; reading it needs the extra `siglip`") from None
    except Exception as error:  # what the libraries raise is a bare Exception
        raise DataError(f"{path}: not a readable tokenizer ({str(error).splitlines()[0]})") from None
    bos = next(iter(backend.encode("").tokens), None)
    if begins is None and (path.suffix != ".json" or path.name == "vocab.json"):
        begins = settings.get("add_bos_token", path.suffix == ".model")
    if begins is not None:
        bos = content_of(settings.get("bos_token", "<s>")) if begins else None
    try:
        return TextTokenizer(backend, bos, content_of(settings.get("pad_token")))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read(path: Path) -> Tokenizer:
    if path.suffix == ".model":
        return _from_sentencepiece(path.read_bytes())
    if path.name != "vocab.json":
        return Tokenizer.from_file(str(path))
    backend = Tokenizer(models.BPE.from_file(str(path), str(path.with_name("merges.txt"))))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = {content_of(value) for key, value in _settings(path).items() if key.endswith("_token")}
    special = sorted(token for token in named if isinstance(token, str))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json."""
    beside = path.with_name("special_tokens_map.json")
    settings = (read_json(beside) if beside.is_file() else {}) | read_settings(path)
    return {key: value for key, value in settings.items() if value is not None}


def _add_tokens(backend: Tokenizer, path: Path) -> None:
    """Those that older directories list by themselves. Raises DataError where one gets another id than it says."""
    if not path.is_file():
        return
    for token, index in sorted(read_json(path).items(), key=lambda item: item[1]):
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        if backend.token_to_id(token) != index:
            raise DataError(f"{path}: {token} is {index}; the vocabulary gives it {backend.token_to_id(token)}")


def _from_sentencepiece(data: bytes) -> Tokenizer:
    """The same vocabulary in the `tokenizers` library; of two merges with one score the lower ids go first."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    if proto.trainer_spec.model_type != BPE:
        raise ValueError("a SentencePiece model that is no BPE")
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    halves = ((piece[:i], piece[i:], index) for piece, index in ids.items() for i in range(1, len(piece)))
    merges = [(-proto.pieces[index].score, ids[a], ids[b], (a, b)) for a, b, index in halves if a in ids and b in ids]
    unknown = next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN)
    fallback = proto.trainer_spec.byte_fallback
    backend = Tokenizer(
        models.BPE(ids, [pair for *_, pair in sorted(merges)], unk_token=unknown, fuse_unk=True, byte_fallback=fallback)
    )
    spec = proto.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(BLANK)] if spec.add_dummy_prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", BLANK)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [piece.piece for piece in proto.pieces if piece.type in (CONTROL, UNKNOWN)]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend
