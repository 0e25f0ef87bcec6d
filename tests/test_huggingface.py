"""Hugging Face directories: every form a LLaMA comes in, and one clear line for what is wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ORACLES
from safetensors.numpy import load_file, save_file

from clip_jax.errors import CheckpointError, ConfigError
from flamingo_jax.interop import huggingface
from flamingo_jax.interop.huggingface import EMBEDDING, HEAD, INDEX, WEIGHTS

ORACLE = ORACLES / "lm_llama"
CONFIG = json.loads((ORACLE / "config.json").read_text())
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return load_file(ORACLE / WEIGHTS)


def put(directory: Path, tensors: dict[str, np.ndarray], **changed: Any) -> Path:
    save_file(tensors, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(CONFIG | changed))
    return directory


def assert_same(got: Any, expected: Any) -> None:
    """The same keys (else tree.map raises) and the same values."""
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_both_spellings_of_the_config_say_the_same() -> None:
    legacy = json.loads((ORACLE / "config_legacy.json").read_text())
    fields = huggingface.model_fields(legacy, "")
    assert fields == huggingface.model_fields(CONFIG, "")
    assert (fields["rope_theta"], fields["norm_eps"], fields["tied"]) == (50000.0, 1e-6, False)


def test_shards_are_one_model(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    shutil.copy(ORACLE / "config.json", tmp_path)
    shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shard_of}))
    fields, params = huggingface.read(tmp_path)
    assert_same((fields, params), huggingface.read(ORACLE))

    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shard_of | {HEAD: "../elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"index\.json: '\.\./elsewhere\.safetensors' is no file name"):
        huggingface.read(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shard_of}))
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: .* stands in another file, too"):
        huggingface.read(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: missing; .*index\.json names it"):
        huggingface.read(tmp_path)


def test_the_stored_dtype_is_kept(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    narrow = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    _, params = huggingface.read(put(tmp_path, narrow))
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), huggingface.read(ORACLE)[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(params, expected)
    wide = narrow | {Q_PROJ: tensors[Q_PROJ]}  # the layers of one parameter are one array
    assert huggingface.read(put(tmp_path, wide))[1]["blocks"]["query"]["kernel"].dtype == np.float32


def test_a_tied_matrix_stored_twice_must_be_the_same(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    twice = tensors | {HEAD: tensors[EMBEDDING]}
    _, params = huggingface.read(put(tmp_path, twice, tie_word_embeddings=True))
    assert "head" not in params
    with pytest.raises(CheckpointError, match=rf"ties {HEAD} to {EMBEDDING}, but they differ"):
        huggingface.read(put(tmp_path, tensors, tie_word_embeddings=True))


def test_a_buffer_that_follows_from_the_config_is_not_needed(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    assert_same(huggingface.read(put(tmp_path, tensors | buffer)), huggingface.read(ORACLE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_PROJ), rf"no tensor {Q_PROJ}$"),
        (lambda t: t.update({"score.weight": t[HEAD]}), r"no place in a LLaMA for tensor score\.weight$"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1].copy()}), rf"{Q_PROJ} is \[47, 48\]; expected \[48, 48\]"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int8)}), rf"{Q_PROJ} is I8; expected F32, F16, BF16"),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name],
            r"no tensor model\.layers\.2\.\S+, model\.layers\.2\.\S+, model\.layers\.2\.\S+ and 6 more$",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    tmp_path: Path, tensors: dict[str, np.ndarray], change: Callable[[dict], Any], message: str
) -> None:
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        huggingface.read(put(tmp_path, tensors))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; expected 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; expected False"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_type is 'llama3'; expected 'default'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "rope_type is 'linear'; expected 'default'"),
        ({"rope_parameters": 3}, "rope_parameters or rope_scaling is 3; expected an object"),
        ({"head_dim": 16}, "head_dim is 16; expected 8"),
        ({"hidden_size": "48"}, "hidden_size is '48'; expected a positive integer"),
        ({"vocab_size": None}, "vocab_size is None; expected a positive integer"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a positive integer"),
        ({"num_key_value_heads": 4}, "4 key/value heads must divide them"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True; expected a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
    ],
)
def test_a_config_that_does_not_fit_is_named(
    tmp_path: Path, tensors: dict[str, np.ndarray], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        huggingface.read(put(tmp_path, tensors, **changed))


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: not readable as JSON"):
        huggingface.read(tmp_path)
    shutil.copy(ORACLE / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")  # never opened
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        huggingface.read(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((ORACLE / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        huggingface.read(tmp_path)
