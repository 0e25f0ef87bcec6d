"""A language model from a Hugging Face directory becomes a checkpoint that a Flamingo is trained on."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ORACLES
from test_load import small_tokenizer

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


def test_a_missing_tokenizer_is_named_and_nothing_is_written(published: Path) -> None:
    (published / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="mpt/tokenizer.json: not found"):
        import_language_model(published, published.parent / "run")
    assert not (published.parent / "run").exists()


def test_more_ids_than_embeddings_are_refused(published: Path) -> None:
    shutil.copy("flamingo_jax/data/assets/wordnet/tokenizer.json", published)
    with pytest.raises(ConfigError, match="has 4096 ids; the language model expects 101"):
        import_language_model(published, published.parent / "run")
