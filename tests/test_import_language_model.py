"""A language model from a Hugging Face directory becomes a checkpoint that a Flamingo is trained on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ORACLES
from safetensors.numpy import save_file
from test_load import small_tokenizer
from test_published_tokenizers import TEXTS, sentencepieces
from tokenizers import ByteLevelBPETokenizer

from clip_jax.errors import ConfigError, DataError
from clip_jax.interop.tensors import read_tensors
from clip_jax.training import checkpoint
from flamingo_jax import cli
from flamingo_jax.data.tokenizer import open_tokenizer
from flamingo_jax.interop.commands import import_language_model


@pytest.fixture
def published(tmp_path: Path) -> Path:
    directory = tmp_path / "mpt"
    shutil.copytree(ORACLES / "lm_mpt", directory)
    small_tokenizer(directory)
    return directory


def test_every_weight_and_the_tokenizer_come_in(published: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = published.parent / "run"
    cli.main(["import", f"hf:{published}", str(workdir)])
    told = capsys.readouterr().out
    assert "0 missing, 0 unused" in told and f"wrote {workdir}/checkpoints/00000000" in told
    stored = checkpoint.load(workdir, "params/language_model")
    original = read_tensors(published)
    assert sum(leaf.size for leaf in jax.tree.leaves(stored)) == sum(v.size for v in original.values())
    assert np.array_equal(stored["embedding"], original["transformer.wte.weight"])
    model = checkpoint.metadata(checkpoint.latest(workdir))["model"]
    assert (model["family"], model["language_model"]["positions"]) == ("language_model", "alibi")
    tokenizer = open_tokenizer(workdir / "checkpoints" / "00000000" / "tokenizer.json", bos="<|startoftext|>")
    assert tokenizer.digest() == model["tokenizer"]["sha256"]  # what training compares


@pytest.mark.parametrize("kind", ["sentencepiece", "gpt2"])
def test_the_tokenizers_of_older_directories_come_in(published: Path, kind: str) -> None:
    """The ids are those of the tokenizer's own library. The table of embeddings is made large enough."""
    (published / "tokenizer.json").unlink()
    theirs: Callable[[str], list[int]]
    if kind == "sentencepiece":
        theirs = sentencepieces(published / "tokenizer.model").encode
    else:
        gpt2 = ByteLevelBPETokenizer()
        gpt2.train_from_iterator(TEXTS, 300, show_progress=False)
        gpt2.save_model(str(published))
        theirs = lambda text: gpt2.encode(text).ids  # noqa: E731
    stored = read_tensors(published)
    wide = np.zeros((400, stored["transformer.wte.weight"].shape[1]), np.float32)
    for file in published.glob("*.safetensors"):
        file.unlink()
    save_file({**stored, "transformer.wte.weight": wide}, published / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**config, "vocab_size": len(wide)}))
    path, _ = import_language_model(published, published.parent / "run")
    ours = open_tokenizer(path / "tokenizer.json", bos=None)
    assert ours.digest() == checkpoint.metadata(path)["model"]["tokenizer"]["sha256"]
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)


def test_a_missing_tokenizer_is_named_and_nothing_is_written(published: Path) -> None:
    (published / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="mpt: no tokenizer there"):
        import_language_model(published, published.parent / "run")
    assert not (published.parent / "run").exists()


def test_more_ids_than_embeddings_are_refused(published: Path) -> None:
    shutil.copy("flamingo_jax/data/assets/wordnet/tokenizer.json", published)
    with pytest.raises(ConfigError, match="mpt: its tokenizer has 4096 ids; the language model expects 101"):
        import_language_model(published, published.parent / "run")
