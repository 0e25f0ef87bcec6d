"""Towers published by themselves: timm's NFNet (timm: models/nfnet.py) and Hugging Face's BERT (transformers:
models/bert). Their classifiers and poolers are left out; what projects into the joint space is new.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_jax.errors import CheckpointError, ConfigError
from clip_jax.interop import mapping
from clip_jax.interop.imported import IGNORED, PREPROCESS, Fields, Imported, chosen_preprocess
from clip_jax.interop.mapping import Row, linear, merge_heads, norm, split_heads
from clip_jax.interop.tensors import Tensors, read_json, read_tensors

EMBED_DIM = 1376  # Flamingo's joint space
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
NFNET_HEAD = r"head\.fc\."
BERT_HEADS = r"(pooler|cls|classifier)\."


def _scaled_conv(ours: str, theirs: str, first: int = 0) -> list[Row]:
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", "p q c d -> d c p q", every=(first, 1)),
        Row(f"{ours}/gain", f"{theirs}.gain", "d -> d 1 1 1", every=(first, 1)),
        Row(f"{ours}/bias", f"{theirs}.bias", every=(first, 1)),
    ]


def _block(ours: str, theirs: str, first: int) -> list[Row]:
    convolutions = dict(
        shortcut_conv="downsample.conv", conv1="conv1", conv2="conv2", conv3="conv2b", conv4="conv3"
    )  # fmt: skip
    rows = [Row(f"{ours}/skip_gain", f"{theirs}.skipinit_gain", every=(first, 1))]
    for name, their_name in convolutions.items():
        rows += _scaled_conv(f"{ours}/{name}", f"{theirs}.{their_name}", first)
    for name, their_name in (("squeeze", "fc1"), ("excite", "fc2")):
        key = f"{theirs}.attn_last.{their_name}"
        rows.append(Row(f"{ours}/squeeze_excite/{name}/kernel", f"{key}.weight", "c d -> d c 1 1", every=(first, 1)))
        rows.append(Row(f"{ours}/squeeze_excite/{name}/bias", f"{key}.bias", every=(first, 1)))
    return rows


def nfnet_layout(stages: int) -> list[Row]:
    rows = [Row("params/vision/projection", "projection")]
    for i in (1, 2, 3, 4):
        rows += _scaled_conv(f"params/vision/stem_conv{i}", f"stem.conv{i}")
    for stage in range(stages):
        rows += _block(f"params/vision/stage{stage + 1}_first", f"stages.{stage}.0", 0)
        rows += _block(f"params/vision/stage{stage + 1}_rest", f"stages.{stage}.*", 1)
    return rows + _scaled_conv("params/vision/final_conv", "final_conv")


_OURS, _THEIRS = "params/text/transformer/blocks", "encoder.layer.*"
BERT_LAYOUT = [
    Row("params/text/projection", "projection"),
    Row("params/text/token_embedding", "embeddings.word_embeddings.weight"),
    Row("params/text/position_embedding", "embeddings.position_embeddings.weight"),
    Row("params/text/type_embedding", "embeddings.token_type_embeddings.weight"),
    *norm("params/text/embedding_norm", "embeddings.LayerNorm"),
    *(
        row
        for name in ("query", "key", "value")
        for row in split_heads(f"{_OURS}/attention/{name}", f"{_THEIRS}.attention.self.{name}")
    ),
    *merge_heads(f"{_OURS}/attention/out", f"{_THEIRS}.attention.output.dense"),
    *norm(f"{_OURS}/attention_norm", f"{_THEIRS}.attention.output.LayerNorm"),
    *linear(f"{_OURS}/mlp/up", f"{_THEIRS}.intermediate.dense"),
    *linear(f"{_OURS}/mlp/down", f"{_THEIRS}.output.dense"),
    *norm(f"{_OURS}/mlp_norm", f"{_THEIRS}.output.LayerNorm"),
]


def read_timm(
    path: str | Path,
    *,
    image_size: int | None = None,
    preprocess: str | Mapping[str, Any] | None = None,
    embed_dim: int | None = None,
    allow: Sequence[str] = (),
) -> Imported:
    """A vision tower from the weights of timm's dm_nfnet_f0 to f6 (or one of other sizes, which its shapes tell).

    Args:
      path: a file of weights, or the directory that holds it.
      image_size: what it shall see; no weight depends on it.
      preprocess: as in `huggingface.read_directory`; by default timm's, ImageNet's mean and deviation.
      embed_dim: the width of the joint space (EMBED_DIM by default); the projection to it is initialised.
      allow: regular expressions for the start of further keys that may be missing (they are then initialised) or
        unused, beside the classifier.

    Raises:
      CheckpointError: unreadable, of another family, or tensors missing, unused or of another shape.
      ConfigError: no image_size.
    """
    if not image_size:
        raise ConfigError(f"{path}: no weight says how large images are; pass image_size")
    tensors = read_tensors(path)
    vision = _nfnet_fields(tensors, str(path))
    config = dict(
        vision=vision | dict(image_size=image_size, remat="none", drop_path=0.0),
        embed_dim=embed_dim or EMBED_DIM,
        activation="gelu",
        dtype="float32",
    )
    fields = chosen_preprocess(PREPROCESS["imagenet"], preprocess, image_size, str(path))
    layout = nfnet_layout(len(vision["layers"]))
    variables, report = mapping.to_ours(layout, config, tensors, str(path), allow=("projection$", NFNET_HEAD, *allow))
    return Imported(config, variables, fields, report, f"timm:{Path(path).name}")


def _nfnet_fields(tensors: Tensors, label: str) -> dict[str, Any]:
    def dimension(key: str, axis: int) -> int:
        if key not in tensors or tensors[key].ndim != 4:
            raise CheckpointError(
                f"{label}: no {key} of 4 dimensions; expected the weights of timm's dm_nfnet_f0 to f6"
            )
        return tensors[key].shape[axis]

    if "stages.0.0.skipinit_gain" not in tensors:  # without it timm pads and scales otherwise
        raise CheckpointError(f"{label}: no stages.0.0.skipinit_gain; expected the weights of timm's dm_nfnet_f0 to f6")
    blocks = {match.groups() for key in tensors if (match := re.match(r"stages\.(\d+)\.(\d+)\.", key))}
    stages = [stage for stage, _ in blocks]
    layers = [stages.count(str(n)) for n in range(len(set(stages)))]
    return dict(
        kind="nfnet",
        layers=tuple(layers),
        channels=tuple(dimension(f"stages.{stage}.0.conv3.weight", 0) for stage in range(len(layers))),
        stem_width=dimension("stem.conv4.weight", 0),
        group_size=dimension("stages.0.0.conv2.weight", 1),
    )


def read_bert(path: str | Path, *, embed_dim: int | None = None, allow: Sequence[str] = ()) -> Imported:
    """A text tower from a BERT's directory: `config.json` and the weights, of BertModel or a model around one.

    Args: see `read_timm`.

    Raises:
      CheckpointError: unreadable, of another family, or tensors missing, unused or of another shape.
    """
    path = Path(path)
    label = str(path / "config.json")
    values = read_json(path / "config.json")
    if values.get("model_type") != "bert":
        raise CheckpointError(f"{label}: model_type {values.get('model_type')!r}; expected bert")
    fields = Fields(values, label)
    if fields.values.get("position_embedding_type", "absolute") != "absolute" or fields.values.get("is_decoder"):
        raise CheckpointError(f"{label}: expected position_embedding_type absolute and no is_decoder")
    positions = fields.integer("max_position_embeddings", 512)
    pad_id = fields.values.get("pad_token_id", 0)
    if not isinstance(pad_id, int) or isinstance(pad_id, bool) or pad_id < 0:
        raise CheckpointError(f"{label}: pad_token_id is {pad_id!r}; a whole number from 0 expected")
    config = dict(
        text=dict(
            kind="bert",
            vocab_size=fields.integer("vocab_size", 30522),
            context_length=positions,
            positions=positions,
            width=fields.integer("hidden_size", 768),
            layers=fields.integer("num_hidden_layers", 12, most=1000),
            heads=fields.integer("num_attention_heads", 12),
            mlp_width=fields.integer("intermediate_size", 3072),
            types=fields.integer("type_vocab_size", 2),
            norm_epsilon=fields.number("layer_norm_eps", 1e-12),
            pad_id=pad_id,
            remat="none",
        ),
        embed_dim=embed_dim or EMBED_DIM,
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        dtype="float32",
    )
    tensors = {_bert_key(key): value for key, value in read_tensors(path).items()}
    variables, report = mapping.to_ours(
        BERT_LAYOUT, config, tensors, str(path), allow=("projection$", BERT_HEADS, *allow), ignore=IGNORED
    )
    return Imported(config, variables, {}, report, f"bert:{path.name}")


def _bert_key(key: str) -> str:
    """Without the prefix that models around BertModel have, and with today's names for what a LayerNorm holds."""
    key = key.removeprefix("bert.")
    for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        key = key.replace(old, new)
    return key
