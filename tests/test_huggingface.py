"""Hugging Face directories: every form a language model comes in, and one clear line for what is wrong."""

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

from clip_jax.errors import CheckpointError, UserError
from flamingo_jax.interop import huggingface

CASES = ("lm_llama", "lm_gpt2", "lm_neox", "lm_opt", "lm_mpt")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def config_of(case: str, name: str = "config.json") -> dict[str, Any]:
    return json.loads((ORACLES / case / name).read_text())


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return load_file(ORACLES / "lm_llama" / WEIGHTS)


def put(directory: Path, tensors: dict[str, np.ndarray], case: str = "lm_llama", **changed: Any) -> Path:
    save_file(tensors, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(config_of(case) | changed))
    return directory


def assert_same(got: Any, expected: Any) -> None:
    """The same keys (else tree.map raises) and the same values."""
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("case", CASES)
def test_both_spellings_of_the_config_say_the_same(case: str) -> None:
    fields = huggingface.model_fields(config_of(case, "config_legacy.json"), "")
    assert fields == huggingface.model_fields(config_of(case), "")
    if case == "lm_llama":
        assert (fields[1]["rope_theta"], fields[1]["norm_eps"], fields[1]["tied"]) == (50000.0, 1e-6, False)
    if case == "lm_neox":
        assert (fields[1]["rotary_fraction"], fields[1]["parallel_residual"]) == (0.25, True)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_used_and_buffers_are_ignored(tmp_path: Path, case: str) -> None:
    tensors = load_file(ORACLES / case / WEIGHTS)
    expected = huggingface.read(ORACLES / case)
    assert set(expected.report.used) == set(tensors)
    buffer = {
        "lm_llama": "model.layers.0.self_attn.rotary_emb.inv_freq",
        "lm_gpt2": "transformer.h.0.attn.bias",
        "lm_neox": "gpt_neox.layers.0.attention.masked_bias",
    }.get(case)
    more = {buffer: np.ones(4, np.float32)} if buffer else {}
    again = huggingface.read(put(tmp_path, tensors | more, case))
    assert_same(again.params, expected.params)
    assert again.report.ignored == list(more)
    assert {leaf.dtype for leaf in jax.tree.leaves(again.params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("case", "prefix"), [("lm_gpt2", "transformer."), ("lm_opt", "model.decoder.")])
def test_names_without_their_prefix_are_read(tmp_path: Path, case: str, prefix: str) -> None:
    tensors = load_file(ORACLES / case / WEIGHTS)
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert_same(huggingface.read(put(tmp_path, bare, case)).params, huggingface.read(ORACLES / case).params)


def test_mpt_1b_has_its_own_names(tmp_path: Path) -> None:
    """As in mosaicml/examples: `ln_1` and `mlp_up`, attention's fields beside the others, norms of queries and keys."""
    renamed = {"norm_f": "ln_f", "norm_": "ln_", "ffn.up_proj": "mlp.mlp_up", "ffn.down_proj": "mlp.mlp_down"}
    tensors = load_file(ORACLES / "lm_mpt" / WEIGHTS)
    for ours, theirs in renamed.items():
        tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    for i in range(3):
        tensors |= {f"transformer.blocks.{i}.attn.{n}_ln.weight": np.full(36, 2.0 + i, np.float32) for n in "qk"}
    config = dict(model_type="mosaic_gpt", d_model=36, n_heads=6, n_layers=3, mlp_ratio=4, vocab_size=101, alibi=True,
                  alibi_bias_max=8, attn_qk_ln=True, no_bias=True, attn_clip_qkv=None)  # fmt: skip
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    got, mpt = huggingface.read(tmp_path), huggingface.read(ORACLES / "lm_mpt")
    assert got.fields == mpt.fields | {"qk_norm": True}
    norms = {name: got.params["blocks"].pop(name)["scale"] for name in ("query_norm", "key_norm")}
    assert_same(got.params, mpt.params)
    for scale in norms.values():
        np.testing.assert_array_equal(scale, np.full((3, 36), 2.0) + np.arange(3)[:, None])


def test_shards_are_one_model(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    shutil.copy(ORACLES / "lm_llama" / "config.json", tmp_path)
    shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shard_of.values()):
        save_file({name: tensors[name] for name in tensors if shard_of[name] == shard}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": shard_of}))
    assert_same(huggingface.read(tmp_path).params, huggingface.read(ORACLES / "lm_llama").params)


def test_the_stored_dtype_is_kept(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    narrow = {name: tensor.astype(jnp.bfloat16) for name, tensor in tensors.items()}
    params = huggingface.read(put(tmp_path, narrow)).params
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), huggingface.read(ORACLES / "lm_llama").params)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert_same(params, expected)
    wide = narrow | {Q_PROJ: tensors[Q_PROJ]}  # the layers of one parameter are one array
    assert huggingface.read(put(tmp_path, wide)).params["blocks"]["query"]["kernel"].dtype == np.float32


def test_a_tied_matrix_stored_twice_must_be_the_same(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    twice = tensors | {HEAD: tensors[EMBEDDING]}
    assert "head" not in huggingface.read(put(tmp_path, twice, tie_word_embeddings=True)).params
    with pytest.raises(CheckpointError, match=rf"ties {HEAD} to {EMBEDDING}, but they differ"):
        huggingface.read(put(tmp_path, tensors, tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_PROJ), rf"1 tensors missing \(first: {Q_PROJ}\)"),
        (lambda t: t.update({"score.weight": t[HEAD]}), r"1 tensors unused \(first: score\.weight\)"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ][:-1].copy()}), rf"{Q_PROJ} has shape \[47, 48\]; this .* \[48, 48\]"),
        (lambda t: t.update({Q_PROJ: t[Q_PROJ].astype(np.int8)}), rf"{Q_PROJ} is int8; floats expected"),
        (
            lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name],
            r"9 tensors missing \(first: model\.layers\.2\.\S+\)",
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
    ("case", "changed", "message"),
    [
        ("lm_llama", {"model_type": "bloom"}, "model_type is 'bloom'; expected one of 'llama', 'gpt2', 'gpt_neox'"),
        ("lm_llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' or 'swish' is supported"),
        ("lm_llama", {"attention_bias": True}, "attention_bias is True; only False is supported"),
        (
            "lm_llama",
            {"rope_parameters": {"rope_type": "dynamic"}},
            "rope_type is 'dynamic'; expected one of 'default', ",
        ),
        ("lm_llama", {"rope_parameters": None, "rope_scaling": {"type": "su"}}, "type is 'su'; expected one of 'defau"),
        (
            "lm_llama",
            {"rope_parameters": {"rope_type": "llama3"}},
            "rope_parameters: factor is None; a number expected",
        ),
        (
            "lm_llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": False}, "rope_parameters": None},
            "truncate is False; only True is supported",
        ),
        ("lm_llama", {"rope_parameters": 3}, "rope_parameters: an object expected, not a int"),
        ("lm_llama", {"head_dim": 16}, "head_dim is 16; only 8 is supported"),
        ("lm_llama", {"hidden_size": "48"}, "hidden_size is '48'; a whole number from 1 to"),
        ("lm_llama", {"vocab_size": None}, "vocab_size is None; a whole number from 1 to"),
        ("lm_llama", {"num_attention_heads": 0}, "num_attention_heads is 0; a whole number from 1 to"),
        ("lm_llama", {"num_key_value_heads": 4}, "4 key/value heads must divide them"),
        ("lm_llama", {"rms_norm_eps": True}, "rms_norm_eps is True; a number expected"),
        ("lm_llama", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; true or false expected"),
        ("lm_gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; only False"),
        ("lm_gpt2", {"activation_function": "tanh"}, "activation_function is 'tanh'; expected one of 'gelu', "),
        ("lm_neox", {"attention_bias": False}, "attention_bias is False; only True is supported"),
        ("lm_opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False; only True is supported"),
        ("lm_opt", {"word_embed_proj_dim": 12}, "word_embed_proj_dim is 12; only 36 is supported"),
        ("lm_mpt", {"attn_config": {"alibi": False}}, "attn_config: alibi is False; only True is supported"),
        ("lm_mpt", {"attn_config": {"clip_qkv": 6}}, "attn_config: clip_qkv is 6; only none is supported"),
        ("lm_mpt", {"no_bias": False}, "no_bias is False; only True is supported"),
    ],
)
def test_a_config_that_does_not_fit_is_named(tmp_path: Path, case: str, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        huggingface.read(put(tmp_path, load_file(ORACLES / case / WEIGHTS), case, **changed))


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not readable JSON"):
        huggingface.read(tmp_path)
    shutil.copy(ORACLES / "lm_llama" / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"no weights there; expected one of model\.safetensors, "):
        huggingface.read(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((ORACLES / "lm_llama" / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: header: not readable as safetensors"):
        huggingface.read(tmp_path)
