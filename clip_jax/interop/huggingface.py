"""Hugging Face's CLIP and SigLIP directories (transformers: models/clip, models/siglip), in and out.

A directory holds `config.json`, the weights and `preprocessor_config.json`. A field that `config.json` leaves out
has transformers' default; that is how these files are written.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import CheckpointError
from clip_jax.interop.imported import (
    Fields,
    Imported,
    chosen_preprocess,
    import_model,
    model_config,
    require,
    write_model,
)
from clip_jax.interop.mapping import Row, joint_heads, linear, merge_heads, norm, split_heads, to_theirs
from clip_jax.interop.tensors import read_json, read_tensors

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers

_TOWER = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "clip": dict(
        vision=_TOWER | dict(image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5),
        text=dict(
            hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8, vocab_size=49408,
            max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5, eos_token_id=49407,
        ),
    ),
    "siglip": dict(
        vision=_TOWER | dict(image_size=224, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6),
        text=_TOWER | dict(
            vocab_size=32000, max_position_embeddings=64, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
        ),
    ),
}  # fmt: skip


def _encoder(tower: str) -> list[Row]:
    ours, theirs = f"params/{tower}/transformer/blocks", f"{tower}_model.encoder.layers.*"
    return [
        *norm(f"{ours}/attention_norm", f"{theirs}.layer_norm1"),
        *(
            row
            for name in ("query", "key", "value")
            for row in split_heads(f"{ours}/attention/{name}", f"{theirs}.self_attn.{name[0]}_proj")
        ),
        *merge_heads(f"{ours}/attention/out", f"{theirs}.self_attn.out_proj"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.layer_norm2"),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
    ]


_BOTH = [
    Row("params/vision/patch_embedding", "vision_model.embeddings.patch_embedding.weight", "p q c d -> d c p q"),
    Row("params/vision/position_embedding", "vision_model.embeddings.position_embedding.weight"),
    *_encoder("vision"),
    *norm("params/vision/ln_post", "vision_model.post_layernorm"),
    Row("params/text/token_embedding", "text_model.embeddings.token_embedding.weight"),
    Row("params/text/position_embedding", "text_model.embeddings.position_embedding.weight"),
    *_encoder("text"),
    *norm("params/text/ln_final", "text_model.final_layer_norm"),
]
_HEAD = "vision_model.head"
LAYOUTS: dict[str, list[Row]] = {
    "clip": [
        *_BOTH,
        Row("params/vision/class_embedding", "vision_model.embeddings.class_embedding"),
        *norm("params/vision/ln_pre", "vision_model.pre_layrnorm"),
        Row("params/vision/projection", "visual_projection.weight", "d e -> e d"),
        Row("params/text/projection", "text_projection.weight", "d e -> e d"),
        Row("params/logit_scale", "logit_scale"),
    ],
    "siglip": [
        *_BOTH,
        Row("params/vision/patch_bias", "vision_model.embeddings.patch_embedding.bias"),
        Row("params/vision/head/probe", f"{_HEAD}.probe", "d -> 1 1 d"),
        *joint_heads("params/vision/head", f"{_HEAD}.attention"),
        *merge_heads("params/vision/head/out", f"{_HEAD}.attention.out_proj"),
        *norm("params/vision/head/mlp_norm", f"{_HEAD}.layernorm"),
        *linear("params/vision/head/mlp/up", f"{_HEAD}.mlp.fc1"),
        *linear("params/vision/head/mlp/down", f"{_HEAD}.mlp.fc2"),
        Row("params/text/projection", "text_model.head.weight", "d e -> e d"),
        Row("params/text/projection_bias", "text_model.head.bias"),
        Row("params/logit_scale", "logit_scale", "-> 1"),
        Row("params/logit_bias", "logit_bias", "-> 1"),
    ],
}


def read_directory(
    path: str | Path,
    *,
    image_size: int | None = None,
    preprocess: str | Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    allow_nan: bool = False,
) -> Imported:
    """A CLIP or SigLIP directory.

    Args:
      path: the directory.
      image_size: another resolution than the config's; the position embedding is resized.
      preprocess: "clip", "siglip" or the fields, where there is no preprocessor_config.json.
      allow: regular expressions for the start of keys that may be missing (they are then initialised) or unused.
      allow_nan: whether weights that are no numbers are let through.

    Raises:
      CheckpointError: unreadable, of another family, or tensors missing, unused or of another shape.
      ConfigError: nothing says how images are prepared.
    """
    path = Path(path)
    label = str(path / "config.json")
    values = read_json(path / "config.json")
    family = values.get("model_type")
    if family not in LAYOUTS:
        raise CheckpointError(f"{label}: model_type {family!r}; expected one of {', '.join(LAYOUTS)}")
    config = _our_config(family, values, label, image_size)
    fields = chosen_preprocess(_preprocess(path), preprocess, config["vision"]["image_size"], str(path))
    return import_model(
        LAYOUTS[family],
        config,
        read_tensors(path, allow_nan=allow_nan),
        str(path),
        position_key="vision_model.embeddings.position_embedding.weight",
        preprocess=fields,
        allow=allow,
        source=f"hf:{path.name}",
    )


def _our_config(family: str, values: Mapping[str, Any], label: str, image_size: int | None) -> dict[str, Any]:
    towers = {}
    for name in ("vision", "text"):
        # `text_config_dict` is an older spelling, which overrides where both are there.
        parts = [Fields(values, label).object(f"{name}_config{suffix}").values for suffix in ("", "_dict")]
        towers[name] = Fields(_DEFAULTS[family][name] | dict(parts[0]) | dict(parts[1]), f"{label}: {name}_config")
    activations = {name: fields.choice("hidden_act", ACTIVATIONS) for name, fields in towers.items()}
    if len(set(activations.values())) != 1:
        raise CheckpointError(f"{label}: towers of two activations, {activations}; one is expected")

    def tower(name: str) -> dict[str, Any]:
        fields = towers[name]
        return dict(
            width=fields.integer("hidden_size"),
            layers=fields.integer("num_hidden_layers", most=1000),
            heads=fields.integer("num_attention_heads"),
            mlp_width=fields.integer("intermediate_size"),
            norm_epsilon=fields.number("layer_norm_eps"),
        )

    vision = dict(
        kind="vit",
        image_size=image_size or towers["vision"].integer("image_size"),
        patch_size=towers["vision"].integer("patch_size"),
        **tower("vision"),
    )
    text = dict(
        vocab_size=towers["text"].integer("vocab_size"),
        context_length=towers["text"].integer("max_position_embeddings"),
        **tower("text"),
    )
    if family == "siglip":
        if towers["vision"].values.get("vision_use_head", True) is not True:
            raise CheckpointError(f"{label}: vision_use_head is false; a model without its head has no embedding")
        embed_dim = towers["text"].integer("projection_size", text["width"])
        vision["pool"] = "map"
        text |= dict(pool="last", causal=False, projection_bias=True)
        return model_config(vision, text, embed_dim, activations["text"], init_logit_scale=0.0, init_logit_bias=0.0)
    end = towers["text"].integer("eos_token_id")
    text["end_id"] = None if end == 2 else end  # 2 marks configs of before 2023: pool at the highest id
    return model_config(vision, text, Fields(values, label).integer("projection_dim", 512), activations["text"])


def _preprocess(path: Path) -> dict[str, Any] | None:
    """The fields of preprocessor_config.json; None where there is none."""
    file = path / "preprocessor_config.json"
    if not file.is_file():
        return None
    values = read_json(file)
    fields = Fields(values, str(file))
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if values.get(key, True) is not True:
            raise CheckpointError(f"{file}: {key} is {values[key]!r}; only true is supported")
    size, crop = values.get("size"), values.get("crop_size")
    squash = isinstance(size, Mapping) and "height" in size and values.get("do_center_crop") is not True
    sides = [side for side in (size, crop) for side in (side.values() if isinstance(side, Mapping) else [side])]
    if not squash and len(set(sides)) != 1:
        raise CheckpointError(f"{file}: size {size} and crop_size {crop}; two equal sizes expected")
    numbers = {}
    for key in ("image_mean", "image_std"):
        value = values.get(key)
        if not (isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)):
            raise CheckpointError(f"{file}: {key} is {value!r}; three numbers expected")
        numbers[key] = [float(x) for x in value]
    return dict(
        mean=numbers["image_mean"],
        std=numbers["image_std"],
        interpolation=fields.choice("resample", RESAMPLE),
        resize_mode="squash" if squash else "shorter side, centre crop",
    )


def write_directory(
    path: str | Path, config: Mapping[str, Any], variables: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> None:
    """Writes `config.json`, `model.safetensors` and `preprocessor_config.json`, complete or not at all.

    Args: as the fields of `Imported`.

    Raises:
      ConfigError: the directory exists, or transformers' CLIP and SigLIP can't express this model.
      CheckpointError: a variable without a place in their layout.
    """
    vision, text = config["vision"], config["text"]
    require(vision["kind"] == "vit", f"a vision tower of kind {vision['kind']}: transformers' CLIP has vit only")
    family = "siglip" if vision.get("pool", "class") == "map" else "clip"
    expected = ("last", False, True) if family == "siglip" else ("end", True, False)
    got = (text.get("pool", "end"), text.get("causal", True), text.get("projection_bias", False))
    require(got == expected, f"a text tower of (pool, causal, projection_bias) {got}: {family} has {expected}")
    theirs = {value: key for key, value in ACTIVATIONS.items()}
    epsilon = 1e-5  # the modules' default

    def tower(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
        return dict(
            model_type=f"{family}_{name}_model",
            hidden_size=fields["width"],
            intermediate_size=fields.get("mlp_width") or 4 * fields["width"],
            num_hidden_layers=fields["layers"],
            num_attention_heads=fields["heads"],
            hidden_act=theirs[config["activation"]],
            layer_norm_eps=fields.get("norm_epsilon", epsilon),
        )

    vision_config = tower(vision, "vision") | dict(image_size=vision["image_size"], patch_size=vision["patch_size"])
    text_config = tower(text, "text") | dict(
        vocab_size=text["vocab_size"], max_position_embeddings=text["context_length"]
    )
    values: dict[str, Any] = dict(model_type=family, dtype="float32")
    if family == "siglip":
        values["architectures"] = ["SiglipModel"]
        text_config |= dict(projection_size=config["embed_dim"], bos_token_id=None, eos_token_id=1, pad_token_id=1)
    else:
        values |= dict(architectures=["CLIPModel"], projection_dim=config["embed_dim"])
        vision_config["projection_dim"] = text_config["projection_dim"] = config["embed_dim"]
        end = text.get("end_id")
        text_config |= dict(bos_token_id=None, eos_token_id=2 if end is None else end, pad_token_id=0)
    values |= dict(vision_config=vision_config, text_config=text_config)
    weights: Mapping[str, np.ndarray] = to_theirs(LAYOUTS[family], variables)
    write_model(
        Path(path),
        ("model.safetensors", weights),
        {"config.json": values, "preprocessor_config.json": _their_preprocess(family, preprocess)},
    )


def _their_preprocess(family: str, preprocess: Mapping[str, Any]) -> dict[str, Any]:
    size = preprocess["image_size"]
    squash = preprocess["resize_mode"] == "squash"
    return dict(
        image_processor_type="SiglipImageProcessor" if family == "siglip" else "CLIPImageProcessor",
        do_convert_rgb=True,
        do_resize=True,
        size={"height": size, "width": size} if squash else {"shortest_edge": size},
        do_center_crop=not squash,
        crop_size={"height": size, "width": size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
        resample={name: number for number, name in RESAMPLE.items()}[preprocess["interpolation"]],
    )
