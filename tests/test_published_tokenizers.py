"""Published tokenizers: the ids of the libraries that they come from, and one clear line for what is none."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from flamingo_models import write_tokenizer
from tokenizers import ByteLevelBPETokenizer

from clip_jax.errors import DataError
from flamingo_jax.data.published_tokenizers import read_tokenizer

TEXTS = ["a red apple", " two  blanks ", "tab\tand 日本語 🎉", "", "Question: how many? Answer:", "x<s>y", "ﬁne Ⅷ"]


def lines(count: int) -> list[str]:
    return Path(__file__).read_text().splitlines()[:count] * 4


def sentencepieces(path: Path, kind: str = "bpe", rule: str = "identity") -> sentencepiece.SentencePieceProcessor:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines(60) if line]), model_writer=file, vocab_size=400,
        model_type=kind, byte_fallback=True, normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity", minloglevel=2,
    )  # fmt: skip
    path.write_bytes(file.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
def test_a_sentencepiece_model_is_read_as_by_its_own_library(tmp_path: Path, rule: str) -> None:
    theirs = sentencepieces(tmp_path / "tokenizer.model", rule=rule)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<image>": 401, "<around>": 400}))
    ours = read_tokenizer(tmp_path)
    assert (ours.bos, ours.bos_id, ours.vocab_size) == ("<s>", 1, 402)
    for text in [*TEXTS, *lines(60)]:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("<around><image>", special=True) == [400, 401]


def test_gpt2s_two_files(tmp_path: Path) -> None:
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(lines(60), 400, special_tokens=["<pad>", "</s>"], show_progress=False)
    theirs.save_model(str(tmp_path))
    settings = {"bos_token": {"content": "</s>"}, "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"}))
    ours = read_tokenizer(tmp_path)
    assert (ours.bos_id, ours.pad_id, ours.vocab_size) == (1, 0, theirs.get_vocab_size())
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode("a</s>") != ours.encode("a</s>", special=True) == [*ours.encode("a"), 1]
    (tmp_path / "tokenizer_config.json").unlink()
    assert read_tokenizer(tmp_path).start_ids == []


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(DataError) as error:
            read_tokenizer(path)
        message = str(error.value)
        assert str(tmp_path) in message and "\n" not in message
        return message

    assert "no tokenizer there (tokenizer.json, tokenizer.model, vocab.json); name one: tokenizer=" in refusal(tmp_path)
    assert "not found; expected one of tokenizer.json" in refusal(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert "tokenizer.model: not a readable tokenizer (" in refusal(tmp_path)
    sentencepieces(tmp_path / "tokenizer.model", "unigram")
    assert "a SentencePiece model that is no BPE" in refusal(tmp_path)
    write_tokenizer(tmp_path, 20, pad_token="<nothing>")
    assert "tokenizer.json: no token <nothing> in the vocabulary" in refusal(tmp_path)
    write_tokenizer(tmp_path, 20)
    (tmp_path / "added_tokens.json").write_text('{"<image>": 30}')
    assert "<image> is 30; the vocabulary gives it 20" in refusal(tmp_path)
