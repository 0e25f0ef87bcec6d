"""The embedded texts: their builder on a few invented entries, their reader, and the tokenizer made of them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clip_jax.data.sources import ASSETS as CLIP_ASSETS
from clip_jax.errors import DataError
from flamingo_jax.data import wordnet
from flamingo_jax.data.text import ASSETS, open_texts
from flamingo_jax.data.tokenizer import TextTokenizer, open_tokenizer, train_text_tokenizer

WORDNET = ASSETS / "wordnet" / wordnet.VERSION

NOUNS = """\
  1 This software and database is being provided to you
00000001 05 n 02 cat 0 true_cat 0 001 @ 00000009 n 0000 | feline mammal having soft fur; "the cat sat"; "it purrs!"
00000002 05 n 01 Felis 0 000 | type genus of the Felidae
00000003 05 n 02 Felis_catus 0 house_cat 0 000 | a tame cat; eats mice
00000004 15 n 01 Paris 0 000 | the capital of France
00000005 18 n 01 swine 0 000 | (slang) offensive term for a person
00000006 05 n 01 moggy 0 000 | a tame cat; eats mice
00000007 05 n 01 thing 0 000 | "no definition"
"""
ADJECTIVES = """\
00000001 00 a 01 asleep(p) 0 000 | in a state of sleep; "the cat sat"; "fell asleep at the wheel"
00000002 00 s 01 dozing 0 000 | half asleep
"""
SENSES = """\
asleep%3:00:00:: 00000001 1 0
cat%1:05:00:: 00000001 1 3
dozing%5:00:00:asleep:00 00000002 1 1
paris%1:15:00:: 00000004 1 1
true_cat%1:05:00:: 00000001 1 1
"""
# Every line of a data file ends with two blanks.
FILES = {
    "dict/index.sense": SENSES,
    "dict/data.noun": NOUNS.replace("\n", "  \n"),
    "dict/data.adj": ADJECTIVES.replace("\n", "  \n"),
}
LINES = [
    "cat, true cat: feline mammal having soft fur. the cat sat. it purrs!",
    "house cat: a tame cat; eats mice.",
    "Paris: the capital of France.",
    "asleep: in a state of sleep. fell asleep at the wheel.",
    "dozing: half asleep.",
]


def read(member: str) -> str:
    return FILES.get(member, "")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the data set, to be damaged."""
    return Path(shutil.copytree(WORDNET, tmp_path / "set"))


@pytest.fixture(scope="module")
def lines() -> dict[str, list[str]]:
    """Split → its entries."""
    sources = {name: open_texts(f"wordnet:{name}") for name in ("train", "held_out")}
    return {name: "\n".join(texts[i] for i in range(len(texts))).split("\n") for name, texts in sources.items()}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return open_tokenizer(WORDNET.parent / "tokenizer.json")


def refusal(call: Callable[[], object]) -> str:
    """The message of the DataError that a call raises; it is one line."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_entries_are_plain_sentences() -> None:
    assert [entry.line() for entry in wordnet.entries(read)] == LINES
    assert [entry.count for entry in wordnet.entries(read)] == [4, 0, 1, 0, 1]


def test_counted_entries_come_first_then_the_shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    found = wordnet.entries(read)
    for expected in ([4], [2, 4], [0, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]):
        monkeypatch.setattr(wordnet, "WORDS", sum(len(LINES[i].split()) for i in expected))
        assert [entry.line() for entry in wordnet.chosen(found)] == [LINES[i] for i in expected]


def test_pages_hold_every_entry_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordnet, "PAGE", 2)
    monkeypatch.setattr(wordnet, "held_out", lambda entry: "asleep" in entry.definition)
    pages = wordnet.pages(wordnet.entries(read))
    assert pages == {
        "train": ["\n".join(LINES[:2]), "\n".join(LINES[2:4])],
        "held_out": [LINES[4]],
    }


def test_written_pages_are_read_back_and_the_same_bytes_in_every_build(tmp_path: Path) -> None:
    pages = {"train": LINES[:4], "held_out": LINES[4:]}
    builds = [tmp_path / name / "wordnet" / wordnet.VERSION for name in ("one", "two")]
    for directory in builds:
        wordnet.write(pages, directory)
    for name, expected in pages.items():
        texts = open_texts(f"tfds:{builds[0]}#{name}")
        assert [texts[i] for i in range(len(texts))] == expected
    one, two = ({path.name: path.read_bytes() for path in directory.iterdir()} for directory in builds)
    assert len(one) == 4 and one == two


def test_embedded_texts_have_their_sizes(lines: dict[str, list[str]]) -> None:
    words = {name: sum(len(line.split()) for line in split) for name, split in lines.items()}
    assert 0.99 * wordnet.WORDS < sum(words.values()) <= wordnet.WORDS
    assert 0.008 < words["held_out"] / words["train"] < 0.012
    assert sum(path.stat().st_size for path in WORDNET.parent.rglob("*") if path.is_file()) < 2.5e6
    assert "sunlight, sunshine, sun: the rays of the sun. the shingles were weathered by the sun and wind." in [
        *lines["train"],
        *lines["held_out"],
    ]


def test_embedded_splits_share_no_entry_and_no_definition(lines: dict[str, list[str]]) -> None:
    definitions = {name: {line.split(": ", 1)[1] for line in split} for name, split in lines.items()}
    assert not definitions["train"] & definitions["held_out"]
    assert len(definitions["train"]) > 0.99 * len(lines["train"]) == 0.99 * len(set(lines["train"]))


def test_missing_and_half_written_data_is_named(directory: Path) -> None:
    assert "'test'" in refusal(lambda: open_texts(f"tfds:{directory}#test"))
    (shard,) = directory.glob("wordnet-train*")
    data = shard.read_bytes()
    shard.write_bytes(data[: len(data) // 2])
    assert str(shard) in refusal(lambda: open_texts(f"tfds:{directory}#train"))
    shard.unlink()
    assert str(shard) in refusal(lambda: open_texts(f"tfds:{directory}#train"))
    assert len(open_texts(f"tfds:{directory}#held_out")) > 0
    (directory / "dataset_info.json").unlink()
    assert "dataset_info.json" in refusal(lambda: open_texts(f"tfds:{directory}#held_out"))


def test_data_set_without_texts_is_refused() -> None:
    message = refusal(lambda: open_texts(f"tfds:{CLIP_ASSETS / 'emoji' / '1.0.0'}#train"))
    assert message.endswith("; expected text") and "label" in message


@pytest.mark.parametrize("spec", ["", "wordnet", "wordnet:", "emoji:train", ":train"])
def test_spec_without_known_kind_or_where_is_refused(spec: str) -> None:
    message = refusal(lambda: open_texts(spec))
    assert repr(spec) in message and "KIND:WHERE" in message


def test_tfds_without_split_is_refused() -> None:
    assert "tfds:DIRECTORY#SPLIT" in refusal(lambda: open_texts("tfds:directory"))


def test_tokenizer_has_its_ids(tokenizer: TextTokenizer) -> None:
    assert tokenizer.vocab_size == wordnet.VOCAB_SIZE
    assert tokenizer.bos_id == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "two  blanks ",
        "A line.\n\nAnother\tone",
        "Ceci n’est pas une pipe",
        "漢字 🐈 \0",
        "<image>Output: a cat<|eos|>",
    ],
)
def test_tokenizer_gives_the_lower_cased_text_back(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.lower()
    assert not {0, 1, 2} & set(ids)  # those of the special tokens


def test_tokenizer_gives_every_held_out_entry_back(tokenizer: TextTokenizer, lines: dict[str, list[str]]) -> None:
    ids = [tokenizer.encode(line) for line in lines["held_out"]]
    assert [tokenizer.decode(row) for row in ids] == [line.lower() for line in lines["held_out"]]
    assert sum(map(len, ids)) < 2 * sum(len(line.split()) for line in lines["held_out"])


def test_tokenizer_splits_digits_singly(tokenizer: TextTokenizer) -> None:
    assert len(tokenizer.encode("1984")) == 4
    assert tokenizer.encode("1984")[3:] == tokenizer.encode("4")


def test_tokenizer_composes_characters_and_leaves_special_tokens_out(tokenizer: TextTokenizer) -> None:
    assert tokenizer.encode("Cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("a cat"), 2, 0]) == "a cat"


def test_tokenizer_is_the_same_in_every_training(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_text_tokenizer(LINES, 280).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert open_tokenizer(tmp_path / "one").vocab_size == 280


def test_texts_too_few_for_the_vocabulary_are_refused() -> None:
    assert "expected 4096" in refusal(lambda: train_text_tokenizer(LINES, 4096))


def test_tokenizer_without_the_special_tokens_is_refused() -> None:
    path = CLIP_ASSETS / "emoji" / "tokenizer.json"
    assert refusal(lambda: open_tokenizer(path)) == f"{path}: no token <|bos|> in the vocabulary"


def test_notice_names_the_package_and_its_licence() -> None:
    notice = (WORDNET.parent / "NOTICE").read_text()
    for package, (version, _) in wordnet.PACKAGES.items():
        assert f"{package} {version}" in notice
    assert "WordNet 3.1 Copyright 2011 by Princeton University.  All rights reserved." in notice
    assert "Permission to use, copy, modify and distribute" in notice
