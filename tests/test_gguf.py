"""GGUF files, written here by the package gguf: the same weights as Hugging Face's, quantised ones, a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
from conftest import ORACLES
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from clip_jax.errors import CheckpointError, ConfigError
from flamingo_jax.interop import huggingface
from flamingo_jax.interop.families import FAMILIES
from flamingo_jax.interop.gguf import GGUF, ROWS

ORACLE = ORACLES / "lm_llama"
HEADS, KV_HEADS = 6, 2
TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "ĠĠ", "Ġ1", "ca", "cat", "<|end|>", "<|image|>"]
MERGES = ["1 2", "Ġ Ġ", "Ġ 1", "c a", "ca t"]
Q = gguf.GGMLQuantizationType


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of queries and keys."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def oracle_tensors() -> dict[str, np.ndarray]:
    """The oracle's tensors under GGUF's names, rows permuted."""
    stored, tensors = load_file(ORACLE / "model.safetensors"), {}
    names = {row.ours: row.theirs for row in ROWS}
    for path, name in ((row.ours, row.theirs) for row in FAMILIES["llama"].layout("model.")):
        for i in range(3 if "*" in name else 1):
            if (weight := stored.get(name.replace("*", str(i)))) is None:
                continue  # a bias, which this model lacks
            if path in ("blocks/query/kernel", "blocks/key/kernel"):
                weight = permute(weight, HEADS if "query" in path else KV_HEADS)
            tensors[names[path].replace("*", str(i))] = np.ascontiguousarray(weight)
    return tensors


METADATA: dict[str, Any] = {
    "llama.embedding_length": 48,
    "llama.block_count": 3,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.feed_forward_length": 90,
    "llama.vocab_size": 95,
    "llama.rope.freq_base": 50000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * (len(TOKENS) - 2) + [3, 4],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 0,
}


def put(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str = "llama",
    quantised: dict[str, Q] | None = None,
    **changed: Any,
) -> GGUF:
    """Writes a file and opens it. In keywords "__" stands for "."."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (METADATA | {key.replace("__", "."): value for key, value in changed.items()}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        kind = (quantised or {}).get(name, Q.F32)
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUF(path)


def test_fields_and_parameters_are_those_of_the_hugging_face_directory(tmp_path: Path) -> None:
    expected = huggingface.read(ORACLE)
    file = put(tmp_path / "model.gguf", oracle_tensors())
    assert file.model_fields() == expected.fields | {"norm_eps": float(np.float32(1e-6))}
    jax.tree.map(np.testing.assert_array_equal, file.params(), expected.params)  # raises where keys differ
    assert file.special_ids() == {"bos_id": 0}


def test_without_an_output_matrix_the_embedding_is_tied(tmp_path: Path) -> None:
    tensors = oracle_tensors()
    del tensors["output.weight"]
    file = put(tmp_path / "model.gguf", tensors)
    assert file.model_fields()["tied"] and "head" not in file.params()


def test_quantised_values_are_what_they_stand_for(tmp_path: Path) -> None:
    """Blocks of 32 values: Q8_0 is a float16 scale times int8, Q4_1 a scale times 0 … 15 plus an offset."""
    rng = np.random.default_rng(0)
    sizes: dict[str, Any] = {
        "llama__embedding_length": 64, "llama__block_count": 1, "llama__attention__head_count": 4,
        "llama__attention__head_count_kv": 2, "llama__feed_forward_length": 96, "llama__vocab_size": 40,
    }  # fmt: skip
    layer: dict[str, tuple[int, ...]] = {
        "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64), "ffn_gate": (96, 64),
        "ffn_up": (96, 64), "ffn_down": (64, 96), "attn_norm": (64,), "ffn_norm": (64,),
    }  # fmt: skip
    shapes = {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (40, 64), "output_norm.weight": (64,)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    kinds = {"token_embd.weight": Q.Q8_0, "blk.0.ffn_down.weight": Q.Q4_1, "blk.0.ffn_up.weight": Q.F16}
    params = put(tmp_path / "model.gguf", tensors, quantised=kinds, **sizes).params()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}

    blocks = tensors["token_embd.weight"].reshape(-1, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 127
    error = np.abs(params["embedding"].reshape(-1, 32) - blocks)
    assert (error <= scale * 0.5 + np.abs(blocks) * 2**-10).all() and error.max() > 0  # scales are float16
    blocks = tensors["blk.0.ffn_down.weight"].reshape(-1, 32)
    got = params["blocks"]["down"]["kernel"][0].T.reshape(-1, 32)
    step = np.ptp(blocks, axis=1, keepdims=True) / 15
    assert (np.abs(got - blocks) <= step * 0.5 + np.abs(blocks).max() * 2**-9).all()
    assert max(len(np.unique(block)) for block in got) <= 16
    np.testing.assert_array_equal(
        params["blocks"]["up"]["kernel"][0].T, tensors["blk.0.ffn_up.weight"].astype(np.float16).astype(np.float32)
    )


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # A digit is a word of its own: blanks before it stay together, and no pair with it is merged.
        ("smollm", ["1", "2", "ĠĠ", "1", "Ġ", "cat", "<|end|>", "<|image|>", "Ã", "©"]),
        ("gpt-2", ["12", "Ġ", "Ġ1", "Ġ", "cat", "<|end|>", "<|image|>", "Ã", "©"]),
    ],
)
def test_the_tokenizer_splits_as_the_file_says(tmp_path: Path, rule: str, expected: list[str]) -> None:
    tokenizer = put(tmp_path / "model.gguf", oracle_tensors(), tokenizer__ggml__pre=rule).tokenizer()
    text = "12  1 cat<|end|><|image|>é"
    encoding = tokenizer.encode(text)
    assert encoding.tokens == expected
    assert encoding.ids == [TOKENS.index(token) for token in expected]
    assert tokenizer.get_vocab_size() == len(TOKENS)
    assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoding.ids) == text.replace("<|end|>", "")  # <|image|> is the user's own


@pytest.mark.parametrize(
    ("arguments", "call", "message"),
    [
        ({"architecture": "gpt2"}, GGUF.params, "general.architecture is 'gpt2'; expected 'llama'"),
        ({"llama__rope__scaling__type": "yarn"}, GGUF.params, "rope.scaling.type is 'yarn'; expected 'none'"),
        ({"llama__attention__key_length": 16}, GGUF.params, "attention.key_length is 16; expected 8"),
        ({"llama__block_count": None}, GGUF.params, "llama.block_count is None; expected a positive integer"),
        ({"llama__attention__head_count_kv": [2, 2, 1]}, GGUF.params, r"count_kv is \[2, 2, 1\]; expected a positive"),
        ({"llama__rope__freq_base": -1.0}, GGUF.params, "freq_base is -1.0; expected a positive number"),
        ({"tokenizer__ggml__model": "llama"}, GGUF.tokenizer, "ggml.model is 'llama'; expected 'gpt2'"),
        ({"tokenizer__ggml__pre": "llama-bpe"}, GGUF.tokenizer, "pre is 'llama-bpe'; expected one of gpt-2, smollm"),
        ({"tokenizer__ggml__tokens": None}, GGUF.tokenizer, "ggml.tokens is None; expected a list"),
        ({"tokenizer__ggml__token_type": [1]}, GGUF.tokenizer, "1 tokenizer.ggml.token_type for 263 tokens"),
        ({"tokenizer__ggml__merges": ["no such"]}, GGUF.tokenizer, "merges do not fit the tokens"),
        ({"tokenizer__ggml__merges": ["1"]}, GGUF.tokenizer, "merges do not fit the tokens"),
    ],
)
def test_metadata_that_do_not_fit_are_named(
    tmp_path: Path, arguments: dict[str, Any], call: Callable[[GGUF], Any], message: str
) -> None:
    file = put(tmp_path / "model.gguf", oracle_tensors(), **arguments)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        call(file)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tensors = oracle_tensors()
    wrong = np.zeros((48, 96), np.float32)
    with pytest.raises(
        CheckpointError, match=r"blk\.1\.attn_q\.weight has shape \[48, 96\]; this model expects \[48, 48\]"
    ):
        put(tmp_path / "a.gguf", tensors | {"blk.1.attn_q.weight": wrong}).params()
    with pytest.raises(CheckpointError, match=r"1 tensors unused \(first: rope_freqs\.weight\)"):
        put(tmp_path / "b.gguf", tensors | {"rope_freqs.weight": wrong[0]}).params()
    del tensors["blk.2.ffn_up.weight"]
    with pytest.raises(CheckpointError, match=r"c\.gguf: 1 tensors missing \(first: blk\.2\.ffn_up\.weight\)"):
        put(tmp_path / "c.gguf", tensors).params()


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf: not found"):
        GGUF(tmp_path / "nowhere.gguf")
    put(tmp_path / "model.gguf", oracle_tensors())
    whole = (tmp_path / "model.gguf").read_bytes()
    for damaged in (b"", b"not a GGUF file", whole[:2000], whole[:-1000]):
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged\.gguf: not a readable GGUF file"):
            GGUF(tmp_path / "damaged.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match="needs the extra `import`"):
        GGUF(tmp_path / "model.gguf")
