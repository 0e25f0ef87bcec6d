"""OpenAI's byte-pair encoding against open_clip's, and tokenizers that lie beside released weights."""

import html
import json
from pathlib import Path

import ftfy
import numpy as np
import pytest
import sentencepiece
import tokenizers
from conftest import ORACLES
from tokenizers import models, normalizers, pre_tokenizers, processors

from clip_jax.data.tokenizer import (
    MAX_CHARACTERS,
    Tokenizer,
    clean_openai,
    clean_siglip,
    load_tokenizer,
    openai_tokenizer,
)
from clip_jax.errors import ConfigError, DataError, RecordError

CASE = ORACLES / "tokenizer"
TEXTS = json.loads((CASE / "texts.json").read_text(encoding="utf-8"))
LONG = " ".join(f"word{i}" for i in range(60))  # 60 words of one or two tokens each


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return openai_tokenizer()


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(CASE / "expected.npz") as file:
        return dict(file)


def test_ids_are_open_clips(tokenizer: Tokenizer, expected: dict[str, np.ndarray]) -> None:
    ids = tokenizer(TEXTS)
    different = [text for text, a, b in zip(TEXTS, ids, expected["ids"], strict=True) if (a != b).any()]
    # open_clip takes its own "<start_of_text>" in a text for the start token; to OpenAI's clip and to us it is text.
    assert different == ["<start_of_text>hello<end_of_text>"]
    assert expected["needs_ftfy"].sum() >= 9


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49408
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (49406, 49407, 0)
    row = tokenizer("<|startoftext|>hello<|endoftext|>")[0]
    assert (row == 49406).sum() == (row == 49407).sum() == 1


def test_hello_world_is_the_published_example(tokenizer: Tokenizer) -> None:
    assert tokenizer("Hello World!", 7).tolist() == [[49406, 3306, 1002, 256, 49407, 0, 0]]


def test_decode(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer("A  Photo of\na café &amp;amp; 日本!")[0]) == "a photo of a café & 日本 !"


def test_plain_texts_are_cleaned_as_all_are() -> None:
    """They go a shorter way, past ftfy and HTML's entities."""
    rng = np.random.default_rng(0)
    plain = ["".join(map(chr, rng.integers(32, 127, size=rng.integers(1, 60)))) for _ in range(2000)]
    for text in [
        *plain,
        "a &amp; b",
        "a &amp;amp; b",
        "a\tb\r\nc",
        "a\x1b[31mb",
        "\x00a",
        "caf\u00c3\u00a9",
        "\u201ca\u201d",
    ]:
        whole = html.unescape(html.unescape(ftfy.fix_text(text)))
        assert clean_openai(text) == " ".join(whole.split()).lower(), text


def test_what_is_cut_is_counted(expected: dict[str, np.ndarray]) -> None:
    tokenizer = openai_tokenizer()
    tokenizer(TEXTS)
    assert tokenizer.truncated == (expected["full_length"] > 77).sum() > 1


def test_overflow_as_an_error_names_text_and_length(tokenizer: Tokenizer) -> None:
    with pytest.raises(RecordError, match=r"^text 1: \d+ tokens; at most 75 fit in context_length 77$"):
        tokenizer(["short", LONG], overflow="error")
    assert tokenizer("short", overflow="error").shape == (1, 77)


def test_windows_hold_every_token_once(tokenizer: Tokenizer) -> None:
    whole = [i for i in tokenizer(LONG, 500)[0] if i not in (0, 49406, 49407)]
    long, short, empty = tokenizer.windows([LONG, "a cat", ""], 20)
    assert long.shape == (-(-len(whole) // 18), 20) and long.dtype == np.int32
    assert (long[:, 0] == 49406).all() and ((long == 49407).sum(axis=1) == 1).all()
    assert [i for i in long.ravel() if i not in (0, 49406, 49407)] == whole
    np.testing.assert_array_equal(short, tokenizer("a cat", 20))
    np.testing.assert_array_equal(empty, tokenizer("", 20))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * (MAX_CHARACTERS + 1), "1,000,001 characters; at most 1,000,000 expected"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "not valid UTF-8"),
        ("\ud800", "not valid UTF-8"),
    ],
    ids=["huge", "latin-1", "surrogate"],
)
def test_what_is_no_text_is_refused_in_one_line(tokenizer: Tokenizer, text: str, reason: str) -> None:
    with pytest.raises(RecordError, match=f"^text 1: {reason}") as caught:
        tokenizer(["fine", text])
    assert "\n" not in str(caught.value)


def test_a_length_that_holds_nothing_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="at least 2 expected, for the start and the end token"):
        tokenizer("x", 1)


def test_cleaning_that_no_file_holds_is_not_saved(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="clean_openai"):
        tokenizer.save(tmp_path / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def test_load_by_name_file_and_directory(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert load_tokenizer("openai").digest() == tokenizer.digest()
    ours = load_tokenizer("emoji/tokenizer.json")
    assert ours.vocab_size == 4096 and ours.context_length is None
    ours.save(tmp_path / "tokenizer.json")
    (tmp_path / "vocab.txt").write_text("a tokenizer.json beside it wins")
    assert load_tokenizer(tmp_path).digest() == load_tokenizer(tmp_path / "tokenizer.json").digest() == ours.digest()


def hugging_face_clip(directory: Path, config: dict) -> Path:
    """A tokenizer.json as Hugging Face's CLIPTokenizer writes it, of a toy vocabulary."""
    vocabulary = {
        c: i for i, c in enumerate(["a", "b", "a</w>", "b</w>", "ab</w>", "<|startoftext|>", "<|endoftext|>"])
    }
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("a", "b</w>")], end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    backend.post_processor = processors.RobertaProcessing(("<|endoftext|>", 6), ("<|startoftext|>", 5))
    backend.enable_truncation(4)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("pad", ["<|endoftext|>", {"content": "<|endoftext|>", "special": True}])
def test_hugging_faces_clip_places_its_own_special_tokens(tmp_path: Path, pad: object) -> None:
    tokenizer = load_tokenizer(hugging_face_clip(tmp_path, {"model_max_length": 8, "pad_token": pad}))
    assert tokenizer(["AB a", "b " * 9]).tolist() == [[5, 4, 2, 6, 6, 6, 6, 6], [5, 3, 3, 3, 3, 3, 3, 6]]
    assert load_tokenizer(hugging_face_clip(tmp_path, {"model_max_length": 10**30}))("a", 4).tolist() == [[5, 2, 6, 0]]


@pytest.fixture(scope="module")
def spiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("siglip")
    (directory / "corpus.txt").write_text("a photo of a cat\nthe dog runs in the park\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "corpus.txt"), model_prefix=str(directory / "spiece"), vocab_size=60,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return directory


def test_siglips_sentencepiece(spiece: Path) -> None:
    tokenizer = load_tokenizer(spiece)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model")).encode("a photo of the dogs")
    (row,) = tokenizer("A  Photo, of the DOG's!")
    assert row.tolist() == pieces + [1] * (64 - len(pieces))  # the end token, and again as padding
    assert (tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id) == (None, 1, 1)
    assert tokenizer("a cat " * 50)[0, -1] == 1 and tokenizer.truncated == 1
    assert tokenizer.decode(row) == "a photo of the dogs"


def test_siglips_cleaning() -> None:
    assert clean_siglip(" Hello,\tWORLD! it's snake_case… ") == "hello world its snakecase…"


def test_berts_wordpiece(tmp_path: Path) -> None:
    words = "[PAD] [UNK] [CLS] [SEP] a cat ##s , A"
    (tmp_path / "vocab.txt").write_text("\n".join(words.split()) + "\n")
    assert load_tokenizer(tmp_path)("A cats, dog", 9).tolist() == [[2, 4, 5, 6, 7, 1, 3, 0, 0]]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 4}')
    assert load_tokenizer(tmp_path)("A cats, dog").tolist() == [[2, 8, 5, 3]]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("spiece.model", b"garbage", "not a readable SentencePiece model"),
        ("vocab.txt", b"a\nb\n", r"no token \[CLS\]"),
        ("vocab.txt", b"\xff\xfe\x00", "not a readable vocabulary"),
        ("tokenizer.json", b"{}", "not a readable tokenizer.json"),
        ("README", b"", "no tokenizer there; expected one of tokenizer.json, spiece.model, vocab.txt"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
