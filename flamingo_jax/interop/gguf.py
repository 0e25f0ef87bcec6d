"""Language models of the LLaMA family, and their tokenizer, from one GGUF file (needs the extra `import`).

Format and keys: ggml's docs/gguf.md; names and the order of rotary pairs: llama.cpp's convert_hf_to_gguf.py. GGUF's
LLaMA rotates the pairs (2i, 2i + 1) of a head; its rows are put back to where (i, i + K/2) is such a pair.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from clip_jax.errors import CheckpointError, ConfigError
from clip_jax.interop.mapping import Row, linear, merge_heads, norm, split_heads
from flamingo_jax.interop.huggingface import PyTree, params_from

QUERY, KEY = "blk.*.attn_q", "blk.*.attn_k"
HEAD = "output.weight"
ROWS = (
    Row("embedding", "token_embd.weight"),
    *norm("blocks/attention_norm", "blk.*.attn_norm"),
    *split_heads("blocks/query", QUERY),
    *split_heads("blocks/key", KEY),
    *split_heads("blocks/value", "blk.*.attn_v"),
    *merge_heads("blocks/out", "blk.*.attn_output"),
    *norm("blocks/mlp_norm", "blk.*.ffn_norm"),
    *(row for name in ("gate", "up", "down") for row in linear(f"blocks/{name}", f"blk.*.ffn_{name}")),
    *norm("final_norm", "output_norm"),
    Row("head", HEAD),
)
CONTROL, USER_DEFINED = 3, 4  # token types
# What GGUF calls the rule for splitting a text into words, before pairs are merged within each.
PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


class GGUF:
    """One file, opened and indexed; tensors are read when they are asked for.

    Raises CheckpointError where it is missing, damaged or no GGUF, ConfigError without the extra `import`.
    """

    def __init__(self, path: str | Path):
        try:
            import gguf
        except ModuleNotFoundError:
            raise ConfigError(f"{path}: reading GGUF needs the extra `import` (the package gguf)") from None
        self.source, self._dequantize = str(path), gguf.dequantize
        if not Path(path).is_file():
            raise CheckpointError(f"{path}: not found; expected a GGUF file")
        try:
            reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as error:  # whatever its parser stumbles on: it does not check what it reads
            raise CheckpointError(f"{path}: not a readable GGUF file ({error})") from None
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def model_fields(self) -> dict[str, Any]:
        """The fields of `DecoderSpec`. Raises ConfigError for another architecture or what the model does not do."""
        if (architecture := self.metadata.get("general.architecture")) != "llama":
            raise ConfigError(f"{self.source}: general.architecture is {architecture!r}; expected 'llama'")
        width, heads = self._number("embedding_length", int), self._number("attention.head_count", int)
        head_size = width // heads
        for key, only in {
            "rope.scaling.type": "none",
            "rope.dimension_count": head_size,
            "attention.key_length": head_size,
            "attention.value_length": head_size,
        }.items():
            if (found := self.metadata.get(f"llama.{key}", only)) != only:
                raise ConfigError(f"{self.source}: llama.{key} is {found!r}; expected {only!r}")
        return dict(
            vocab_size=self._number("vocab_size", int, len(self._list("tokenizer.ggml.tokens"))),
            width=width,
            layers=self._number("block_count", int),
            heads=heads,
            kv_heads=self._number("attention.head_count_kv", int, heads),
            mlp_width=self._number("feed_forward_length", int),
            rope_theta=self._number("rope.freq_base", float, 10000.0),
            norm_eps=self._number("attention.layer_norm_rms_epsilon", float),
            tied=HEAD not in self._tensors,
        )

    def params(self) -> PyTree:
        """The parameters of `LanguageModel`, float32 numpy arrays: exactly what the quantised values stand for.

        Raises CheckpointError where a tensor is missing, left over, of another shape, or quantised in an
        unknown way, ConfigError as `model_fields` does.
        """
        fields = self.model_fields()
        paired = {
            f"{name.replace('*', str(i))}.weight": heads
            for name, heads in ((QUERY, fields["heads"]), (KEY, fields["kv_heads"]))
            for i in range(fields["layers"])
        }

        def read(name: str) -> np.ndarray:
            tensor = self._tensors[name]
            try:
                array = self._dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError:
                kind = tensor.tensor_type.name
                raise CheckpointError(f"{self.source}: {name} is quantised as {kind}, which gguf can't read") from None
            return halves_apart(array, paired[name]) if name in paired else array

        return params_from(ROWS, fields, LazyTensors(list(self._tensors), read), self.source)[0]

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The byte-level BPE in the file. No start or end token is added to a text.

        Raises ConfigError for another kind of tokenizer or an unknown rule for splitting words.
        """
        kind, rule = (self.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if kind != "gpt2":
            raise ConfigError(f"{self.source}: tokenizer.ggml.model is {kind!r}; expected 'gpt2' (byte-level BPE)")
        if rule not in PRE_TOKENIZERS:
            raise ConfigError(
                f"{self.source}: tokenizer.ggml.pre is {rule!r}; expected one of {', '.join(PRE_TOKENIZERS)}"
            )
        tokens, types, merges = (self._list(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
        if len(types) != len(tokens):
            raise CheckpointError(f"{self.source}: {len(types)} tokenizer.ggml.token_type for {len(tokens)} tokens")
        pairs = [tuple(merge.split(" ")) for merge in merges]
        try:
            backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
        except Exception as error:  # what the library raises is a bare Exception
            raise CheckpointError(f"{self.source}: tokenizer.ggml.merges do not fit the tokens ({error})") from None
        backend.pre_tokenizer = PRE_TOKENIZERS[rule]()
        backend.decoder = decoders.ByteLevel()
        backend.add_tokens(
            [
                tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
                for token, kind in zip(tokens, types, strict=True)
                if kind in (CONTROL, USER_DEFINED)
            ]
        )
        return backend

    def special_ids(self) -> dict[str, int]:
        """The ids that the file names: {"bos_id": …, "eos_id": …}, those that there are."""
        ids = {f"{name}_id": self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        return {name: index for name, index in ids.items() if index is not None}

    def _list(self, key: str) -> list[Any]:
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise ConfigError(f"{self.source}: {key} is {value!r}; expected a list")
        return value

    def _number(self, key: str, kind: Any, default: Any = None) -> Any:
        value = self.metadata.get(f"llama.{key}", default)
        if type(value) is not kind or value <= 0:
            expected = "a positive integer" if kind is int else "a positive number"
            raise ConfigError(f"{self.source}: llama.{key} is {value!r}; expected {expected}")
        return value


class LazyTensors(Mapping[str, np.ndarray]):
    """Name → array, read when it is asked for."""

    def __init__(self, names: Sequence[str], read: Callable[[str], np.ndarray]):
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:  # Mapping's own reads the array
        return name in self._names


def halves_apart(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (2i, 2i + 1) of every head → rows (i, i + K/2)."""
    return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
