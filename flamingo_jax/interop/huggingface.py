"""Language models of the LLaMA family from a Hugging Face directory: config.json and safetensors.

Names and defaults: transformers, `models/llama`. Both spellings of config.json are read, that of transformers 5
(`rope_parameters`) and the one before (`rope_theta`, `rope_scaling`).
"""

import contextlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from clip_jax.errors import CheckpointError, ConfigError
from flamingo_jax.interop.llama import PyTree, assemble

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES = {
    "embedding": EMBEDDING,
    "blocks/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "blocks/query/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "blocks/key/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "blocks/value/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "blocks/out/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "blocks/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "blocks/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "blocks/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "blocks/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head": HEAD,
}
# Some older files hold this buffer, which follows from rope_theta.
BUFFER = "self_attn.rotary_emb.inv_freq"
DTYPES = ("F32", "F16", "BF16")


def read(directory: str | Path) -> tuple[dict[str, Any], PyTree]:
    """Reads a directory with config.json and either model.safetensors or shards with their index.

    Returns:
      The fields of `LanguageModel`, and its parameters as numpy arrays of the dtype they are stored in.

    Raises:
      ConfigError: config.json is unreadable or asks for what `LanguageModel` does not do.
      CheckpointError: a file or tensor is missing, damaged, left over, or of another shape.
    """
    directory = Path(directory)
    fields = model_fields(_json(directory / CONFIG, ConfigError), str(directory / CONFIG))
    with contextlib.ExitStack() as stack:
        file_of: dict[str, Any] = {}
        for path in _weight_files(directory):
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None
            for name in file.keys():  # noqa: SIM118  (not a dict)
                if name in file_of:
                    raise CheckpointError(f"{path}: {name} stands in another file, too")
                if (dtype := file.get_slice(name).get_dtype()) not in DTYPES:
                    raise CheckpointError(f"{path}: {name} is {dtype}; expected {', '.join(DTYPES)}")
                file_of[name] = file

        def tensor(name: str) -> np.ndarray:
            return file_of[name].get_tensor(name)

        for name in [name for name in file_of if name.endswith(BUFFER)]:
            logging.info("%s: %s is not needed", directory, name)
            del file_of[name]
        if fields["tied"] and HEAD in file_of and EMBEDDING in file_of:  # stored twice by some writers
            if not np.array_equal(tensor(HEAD), tensor(EMBEDDING)):
                raise CheckpointError(f"{directory}: {CONFIG} ties {HEAD} to {EMBEDDING}, but they differ")
            del file_of[HEAD]
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in file_of.items()}
        return fields, assemble(fields, NAMES, shapes, tensor, str(directory))


def model_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What config.json says, as the fields of `LanguageModel`; absent keys have LLaMA's defaults.

    Raises ConfigError for another architecture, and for what the model does not do.
    """

    def value(key: str, kind: Any, default: Any = None) -> Any:
        found = config.get(key)
        found = default if found is None else found
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind or (kind is not bool and found <= 0):
            expected = {int: "a positive integer", float: "a positive number", bool: "true or false"}[kind]
            raise ConfigError(f"{source}: {key} is {found!r}; expected {expected}")
        return found

    def only(key: str, found: Any, *allowed: Any) -> None:
        if found not in allowed:
            raise ConfigError(f"{source}: {key} is {found!r}; expected {allowed[0]!r}")

    only("model_type", config.get("model_type"), "llama")
    only("hidden_act", config.get("hidden_act", "silu"), "silu", "swish")
    only("attention_bias", config.get("attention_bias", False), False)
    only("mlp_bias", config.get("mlp_bias", False), False)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{source}: rope_parameters or rope_scaling is {rope!r}; expected an object")
    only("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")

    width, heads = value("hidden_size", int), value("num_attention_heads", int)
    only("head_dim", config.get("head_dim"), width // heads, None)
    return dict(
        vocab_size=value("vocab_size", int),
        width=width,
        layers=value("num_hidden_layers", int),
        heads=heads,
        kv_heads=value("num_key_value_heads", int, heads),
        mlp_width=value("intermediate_size", int),
        rope_theta=value("rope_theta", float, rope.get("rope_theta", 10000.0)),
        norm_eps=value("rms_norm_eps", float, 1e-6),
        tied=value("tie_word_embeddings", bool, False),
    )


def _weight_files(directory: Path) -> list[Path]:
    """The one file, or every shard that the index names."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not (directory / INDEX).is_file():
        raise CheckpointError(f"{directory}: neither {WEIGHTS} nor {INDEX}")
    shard_of = _json(directory / INDEX, CheckpointError).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise CheckpointError(f"{directory / INDEX}: weight_map is missing; expected tensor → file")
    shards = sorted(set(shard_of.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{directory / INDEX}: {shard!r} is no file name beside it")
        if not (directory / shard).is_file():
            raise CheckpointError(f"{directory / shard}: missing; {INDEX} names it")
    return [directory / shard for shard in shards]


def _json(path: Path, error: type[ConfigError] | type[CheckpointError]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as reason:
        raise error(f"{path}: not readable as JSON ({reason})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object")
    return value
