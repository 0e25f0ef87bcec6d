"""Texts to ids and back."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from clip_jax.data.sources import find_asset
from clip_jax.data.tokenizer import Tokenizer, clean, train_tokenizer
from clip_jax.errors import DataError

TEXTS = [
    "a red apple",
    "a green apple",
    "a red car",
    "the green car is red",
    "grinning face",
    "naïve café",
] * 3
SIZE = 256 + 3 + 20
TRICKY = [
    "",
    " ",
    "A Red APPLE",
    "two\nlines\r\nand\ttabs",
    "  many   blanks  ",
    "ÄÖÜ ß ñ ø İ",
    "日本語のテキスト 한국어 العربية",
    "😀 family 👨‍👩‍👧 flag 🇫🇷 #️⃣",
    "punctuation: (a) 'b' \"c\" – d… e/f\\g",
    "<html> & <|other|> 100%",
    "non\u00a0breaking\u2003em\u200bzero",
    "e\u0301 composed",
    "x" * 50,
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, SIZE)


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return Tokenizer.from_file(find_asset("emoji/tokenizer.json"))


@pytest.mark.parametrize("name", ["tokenizer", "embedded"])
def test_padding_is_zero_and_the_end_is_the_highest_id(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.pad_id == 0
    assert tokenizer.start_id == tokenizer.vocab_size - 2
    assert tokenizer.end_id == tokenizer.vocab_size - 1


def test_vocabulary_has_exactly_the_size_asked_for(tokenizer: Tokenizer, embedded: Tokenizer) -> None:
    assert tokenizer.vocab_size == SIZE
    assert embedded.vocab_size == 4096


def test_rows_are_start_text_end_padding(tokenizer: Tokenizer) -> None:
    ids = tokenizer(["a red apple", "", "a car"], 16)
    assert ids.shape == (3, 16) and ids.dtype == np.int32
    for row in ids:
        end = int(row.argmax())
        assert row[0] == tokenizer.start_id and row[end] == tokenizer.end_id
        assert (row[1:end] != tokenizer.pad_id).all() and (row[1:end] < tokenizer.start_id).all()
        assert (row[end + 1 :] == tokenizer.pad_id).all()
    assert ids[1].tolist() == [tokenizer.start_id, tokenizer.end_id] + [0] * 14


def test_one_text_is_a_batch_of_one(tokenizer: Tokenizer) -> None:
    np.testing.assert_array_equal(tokenizer("a red car", 8), tokenizer(["a red car"], 8))


def test_no_texts_give_no_rows(tokenizer: Tokenizer) -> None:
    assert tokenizer([], 8).shape == (0, 8)


@pytest.mark.parametrize("length", [2, 3, 5, 8])
def test_truncation_keeps_the_end_token(tokenizer: Tokenizer, length: int) -> None:
    text = "the green car is red and the apple is not"
    (full,), (cut,) = tokenizer(text, 64), tokenizer(text, length)
    assert cut[-1] == tokenizer.end_id
    np.testing.assert_array_equal(cut[:-1], full[: length - 1])


def test_text_that_just_fits_is_not_cut(tokenizer: Tokenizer) -> None:
    (full,) = tokenizer("a red apple", 64)
    used = int(full.argmax()) + 1
    np.testing.assert_array_equal(tokenizer("a red apple", used)[0], full[:used])


@pytest.mark.parametrize("name", ["tokenizer", "embedded"])
@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_round_trip_up_to_case_and_blanks(text: str, name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    (ids,) = tokenizer(text, 256)
    assert tokenizer.decode(ids) == clean(unicodedata.normalize("NFC", text).lower())


def test_case_and_blanks_make_no_difference(tokenizer: Tokenizer) -> None:
    np.testing.assert_array_equal(tokenizer(" A  RED\napple ", 16), tokenizer("a red apple", 16))


def test_special_tokens_in_a_text_do_not_pass_for_real_ones(tokenizer: Tokenizer) -> None:
    (row,) = tokenizer("a <|endoftext|> b <|startoftext|> c <|pad|> d", 128)
    end = int(row.argmax())
    assert (row == tokenizer.end_id).sum() == 1
    assert (row == tokenizer.start_id).sum() == 1
    assert (row[:end] != tokenizer.pad_id).all() and (row[end + 1 :] == tokenizer.pad_id).all()


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(iter(TEXTS), SIZE).digest() == tokenizer.digest()
    assert train_tokenizer(TEXTS, SIZE + 1).digest() != tokenizer.digest()


def test_saved_file_is_read_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    again = Tokenizer.from_file(path)
    assert again.digest() == tokenizer.digest()
    np.testing.assert_array_equal(again(TRICKY, 32), tokenizer(TRICKY, 32))
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.json: not found"):
        Tokenizer.from_file(tmp_path / "nowhere.json")


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[1]", b"garbage", b"\xff\xfe\x00"])
def test_garbage_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        Tokenizer.from_file(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_file_without_the_special_tokens_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    path.write_text(path.read_text().replace("<|endoftext|>", "<|stop|>"))
    with pytest.raises(DataError, match=r"tokenizer.json: no token <\|endoftext\|>"):
        Tokenizer.from_file(path)


@pytest.mark.parametrize("size", [100, 4096])
def test_vocabulary_that_cannot_be_reached_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=f"expected {size}"):
        train_tokenizer(TEXTS, size)
