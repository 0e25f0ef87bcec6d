"""open_clip's and OpenAI's state dicts, in and out.

OpenAI's files (github.com/openai/CLIP) hold the weights alone: their sizes follow from the shapes (heads are 64
wide), and the rest is fixed: QuickGELU, the end of the text at the highest id, CLIP's preprocessing.
open_clip's configs (open_clip: model_configs/*.json, or an `open_clip_config.json` beside the weights) say more;
a field that they leave out has open_clip's default.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.errors import CheckpointError
from clip_jax.interop.imported import (
    PREPROCESS,
    Fields,
    Imported,
    chosen_preprocess,
    import_model,
    model_config,
    require,
    write_model,
)
from clip_jax.interop.mapping import Row, joint_heads, linear, merge_heads, norm, split_heads, to_theirs
from clip_jax.interop.tensors import Tensors, read_json, read_tensors

RESIZE_MODES = {"shortest": "shorter side, centre crop", "squash": "squash"}
RESNET_HEAD_WIDTH = 64
POSITIONS = "visual.positional_embedding"

_VISION = ("image_size", "layers", "width", "head_width", "mlp_ratio", "patch_size", "patch_dropout", "norm_kwargs")
_TEXT = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs", "pool_type", "eos_id",
         "no_causal_mask", "pad_id", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")  # fmt: skip
# Fields that change nothing at these values. (None and False never do.)
_HARMLESS = dict(pool_type="tok", pos_embed_type="learnable", attn_pooler_queries=256, attn_pooler_heads=8,
                 block_type="default", proj_type="linear", timm_pool="avg", timm_proj="linear", timm_drop=0.0,
                 hf_model_pretrained=True, hf_pooler_type="mean_pooler", hf_proj_type="mlp", act_kwargs={})  # fmt: skip


def _blocks(ours: str, theirs: str) -> list[Row]:
    ours, theirs = f"{ours}/transformer/blocks", f"{theirs}.*"
    return [
        *norm(f"{ours}/attention_norm", f"{theirs}.ln_1"),
        *joint_heads(f"{ours}/attention", f"{theirs}.attn"),
        *merge_heads(f"{ours}/attention/out", f"{theirs}.attn.out_proj"),
        *norm(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj"),
    ]


_VIT = [
    Row("params/vision/patch_embedding", "visual.conv1.weight", "p q c d -> d c p q"),
    Row("params/vision/class_embedding", "visual.class_embedding"),
    Row("params/vision/position_embedding", POSITIONS),
    *norm("params/vision/ln_pre", "visual.ln_pre"),
    *_blocks("params/vision", "visual.transformer.resblocks"),
    *norm("params/vision/ln_post", "visual.ln_post"),
    Row("params/vision/projection", "visual.proj"),
]


def _text(prefix: str) -> list[Row]:
    """`prefix` is "text." where the text tower is a module of its own (`custom_text`)."""
    return [
        Row("params/text/token_embedding", f"{prefix}token_embedding.weight"),
        Row("params/text/position_embedding", f"{prefix}positional_embedding"),
        *_blocks("params/text", f"{prefix}transformer.resblocks"),
        *norm("params/text/ln_final", f"{prefix}ln_final"),
        Row("params/text/projection", f"{prefix}text_projection"),
        Row("params/logit_scale", "logit_scale"),
        Row("params/logit_bias", "logit_bias"),
    ]


def _convolution(ours: str, conv: str, conv_theirs: str, bn: str, bn_theirs: str) -> list[Row]:
    """A convolution without bias and its BatchNorm, with the running statistics."""
    return [
        Row(f"params/{ours}/{conv}/kernel", f"{conv_theirs}.weight", "p q c d -> d c p q"),
        *norm(f"params/{ours}/{bn}", bn_theirs),
        Row(f"batch_stats/{ours}/{bn}/mean", f"{bn_theirs}.running_mean"),
        Row(f"batch_stats/{ours}/{bn}/var", f"{bn_theirs}.running_var"),
    ]


def _resnet(stages: Sequence[int]) -> list[Row]:
    rows = []
    for i in (1, 2, 3):
        rows += _convolution("vision", f"stem_conv{i}", f"visual.conv{i}", f"stem_bn{i}", f"visual.bn{i}")
    for stage, blocks in enumerate(stages, 1):
        for block in range(blocks):
            ours, theirs = f"vision/stage{stage}_block{block}", f"visual.layer{stage}.{block}"
            for i in (1, 2, 3):
                rows += _convolution(ours, f"conv{i}", f"{theirs}.conv{i}", f"bn{i}", f"{theirs}.bn{i}")
            shortcut = f"{theirs}.downsample"
            rows += _convolution(ours, "shortcut_conv", f"{shortcut}.0", "shortcut_bn", f"{shortcut}.1")
    pool, theirs = "params/vision/pool", "visual.attnpool"
    rows.append(Row(f"{pool}/position_embedding", f"{theirs}.positional_embedding"))
    for name in ("query", "key", "value"):
        rows += split_heads(f"{pool}/{name}", f"{theirs}.{name[0]}_proj")
    return rows + merge_heads(f"{pool}/out", f"{theirs}.c_proj")


def layout(config: Mapping[str, Any], prefix: str = "") -> list[Row]:
    """The table for a model; `prefix` as in open_clip's `custom_text` models, "text."."""
    vision = config["vision"]
    return (_VIT if vision["kind"] == "vit" else _resnet(vision["layers"])) + _text(prefix)


def read_open_clip(
    path: str | Path,
    config_path: str | Path | None = None,
    *,
    image_size: int | None = None,
    preprocess: str | Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    allow_nan: bool = False,
) -> Imported:
    """open_clip's weights with their config.

    Args:
      path: a file of weights, or a directory with an `open_clip_config.json`.
      config_path: the config; by default `open_clip_config.json` beside the weights.
      image_size, preprocess, allow, allow_nan: see `huggingface.read_directory`.

    Raises:
      CheckpointError: unreadable, of an architecture without a counterpart here, or tensors missing, unused or
        of another shape.
      ConfigError: nothing says how images are prepared.
    """
    path = Path(path)
    file = Path(config_path) if config_path else (path if path.is_dir() else path.parent) / "open_clip_config.json"
    values = read_json(file)
    found = (
        _preprocess(Fields(values["preprocess_cfg"], f"{file}: preprocess_cfg")) if "preprocess_cfg" in values else None
    )
    top = Fields(values.get("model_cfg", values), str(file))
    config = _our_config(top, image_size)
    fields = chosen_preprocess(found, preprocess, config["vision"]["image_size"], str(file))
    tensors = _without_wrapper(read_tensors(path, allow_nan=allow_nan))
    prefix = "text." if "text.token_embedding.weight" in tensors else ""
    return import_model(
        layout(config, prefix),
        config,
        tensors,
        str(path),
        position_key=POSITIONS,
        preprocess=fields,
        allow=allow,
        source=f"open_clip:{path.name}",
    )


def read_openai(
    path: str | Path,
    *,
    image_size: int | None = None,
    preprocess: str | Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    allow_nan: bool = False,
) -> Imported:
    """OpenAI's own weights: the TorchScript archive that they publish, or its state dict.

    Args: see `huggingface.read_directory`. Raises CheckpointError as `read_open_clip` does.
    """
    tensors = read_tensors(path, allow_nan=allow_nan)
    config = _openai_config(tensors, str(path))
    if image_size:
        config["vision"]["image_size"] = image_size
    fields = chosen_preprocess(PREPROCESS["clip"], preprocess, config["vision"]["image_size"], str(path))
    return import_model(
        layout(config),
        config,
        tensors,
        str(path),
        position_key=POSITIONS,
        preprocess=fields,
        allow=allow,
        source=f"openai:{Path(path).name}",
    )


def _without_wrapper(tensors: Tensors) -> Tensors:
    """A distributed wrapper's prefix is dropped: training checkpoints carry it."""
    if all(key.startswith("module.") for key in tensors):
        return {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _our_config(top: Fields, image_size: int | None) -> dict[str, Any]:
    top.refuse_others(
        ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"), {}
    )
    vision, text = top.object("vision_cfg"), top.object("text_cfg")
    vision.refuse_others(_VISION, _HARMLESS)
    text.refuse_others(_TEXT, _HARMLESS)
    width, layers = vision.integer("width", 768), vision.values.get("layers", 12)
    size, head_width = image_size or vision.integer("image_size", 224), vision.integer("head_width", 64)
    ours: dict[str, Any]
    if isinstance(layers, list):
        if len(layers) != 4 or not all(isinstance(n, int) and 1 <= n <= 1000 for n in layers):
            raise CheckpointError(f"{vision.label}: layers is {layers!r}; four numbers of blocks expected")
        heads = width * 32 // head_width
        ours = dict(kind="resnet", image_size=size, width=width, layers=tuple(layers), heads=heads)
    else:
        ours = dict(
            kind="vit",
            image_size=size,
            patch_size=vision.integer("patch_size", 16),
            width=width,
            layers=vision.integer("layers", 12, most=1000),
            heads=width // head_width,
            mlp_width=int(width * vision.number("mlp_ratio", 4.0)),
            norm_epsilon=vision.object("norm_kwargs").number("eps", 1e-5),
            patch_dropout=vision.number("patch_dropout", 0.0),
        )
    text_width = text.integer("width", 512)
    theirs = dict(
        vocab_size=text.integer("vocab_size", 49408),
        context_length=text.integer("context_length", 77),
        width=text_width,
        layers=text.integer("layers", 12, most=1000),
        heads=text.integer("heads", 8),
        mlp_width=int(text_width * text.number("mlp_ratio", 4.0)),
        norm_epsilon=text.object("norm_kwargs").number("eps", 1e-5),
        causal=not text.choice("no_causal_mask", {True: True, False: False}, False),
        pool=text.choice("pool_type", {"argmax": "end", "eos": "end", "last": "last"}, "argmax"),
        end_id=text.integer("eos_id", 2) if text.values.get("pool_type") == "eos" else None,
    )
    rest = {}
    if top.values.get("init_logit_bias") is not None:
        rest["init_logit_bias"] = top.number("init_logit_bias")
    activation = top.choice("quick_gelu", {True: "quick_gelu", False: "gelu"}, False)
    return model_config(ours, theirs, top.integer("embed_dim"), activation, **rest)


def _preprocess(fields: Fields) -> dict[str, Any]:
    """open_clip's defaults are those of its `PreprocessCfg`."""
    found: dict[str, Any] = {}
    for key in ("mean", "std"):
        value = fields.values.get(key, PREPROCESS["clip"][key])
        value = [value] * 3 if isinstance(value, int | float) else value
        if not (isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)):
            raise CheckpointError(f"{fields.label}: {key} is {value!r}; three numbers expected")
        found[key] = value
    found["interpolation"] = fields.choice("interpolation", {"bicubic": "bicubic", "bilinear": "bilinear"}, "bicubic")
    found["resize_mode"] = fields.choice("resize_mode", RESIZE_MODES, "shortest")
    return found


def _openai_config(tensors: Tensors, label: str) -> dict[str, Any]:
    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in tensors or tensors[key].ndim != rank:
            raise CheckpointError(f"{label}: no {key} of {rank} dimensions; not a state dict of OpenAI's CLIP")
        return tensors[key].shape

    def count(prefix: str) -> int:
        """Of the modules `prefix`0, `prefix`1, …"""
        return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})

    def grid(key: str) -> int:
        return math.isqrt(shape(key, 2)[0] - 1)

    vision: dict[str, Any]
    if "visual.proj" in tensors:
        width, _, patch, _ = shape("visual.conv1.weight", 4)
        vision = dict(
            kind="vit",
            image_size=patch * grid(POSITIONS),
            patch_size=patch,
            width=width,
            layers=count("visual.transformer.resblocks."),
            heads=width // 64,
        )
    else:
        width = shape("visual.layer1.0.conv1.weight", 4)[0]
        vision = dict(
            kind="resnet",
            image_size=32 * grid("visual.attnpool.positional_embedding"),
            width=width,
            layers=tuple(count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4)),
            heads=width * 32 // RESNET_HEAD_WIDTH,
        )
    vocab_size, text_width = shape("token_embedding.weight", 2)
    text = dict(
        vocab_size=vocab_size,
        context_length=shape("positional_embedding", 2)[0],
        width=text_width,
        layers=count("transformer.resblocks."),
        heads=text_width // 64,
        end_id=None,
    )
    for tower in (vision, text):
        if not tower["heads"] or not tower["image_size" if "kind" in tower else "layers"]:
            raise CheckpointError(f"{label}: towers of {width} and {text_width}; OpenAI's have heads of 64")
    return model_config(vision, text, shape("text_projection", 2)[1], "quick_gelu")


def write_open_clip(
    path: str | Path, config: Mapping[str, Any], variables: Mapping[str, Any], preprocess: Mapping[str, Any]
) -> None:
    """Writes a directory that open_clip loads as `local-dir:PATH`: `open_clip_config.json` and safetensors.

    Args: as the fields of `Imported`. Raises as `huggingface.write_directory` does.
    """
    vision, text = config["vision"], config["text"]
    require(vision.get("pool", "class") == "class", "a vision tower of pool map: open_clip has it from timm only")
    require(not text.get("projection_bias"), "a text tower with projection_bias: not in this layout")
    require(config["activation"] != "gelu_tanh", "activation gelu_tanh: open_clip has quick_gelu and gelu")
    if vision["kind"] == "vit":
        towers: dict[str, Any] = dict(
            patch_size=vision["patch_size"],
            layers=vision["layers"],
            head_width=vision["width"] // vision["heads"],
            patch_dropout=vision.get("patch_dropout", 0.0),
            **_their_sizes(vision),
        )
    else:
        require(len(vision["layers"]) == 4, f"a ResNet of {len(vision['layers'])} stages: open_clip's have 4")
        towers = dict(layers=list(vision["layers"]), head_width=vision["width"] * 32 // vision["heads"])
    end = text.get("end_id")
    model: dict[str, Any] = dict(
        embed_dim=config["embed_dim"],
        quick_gelu=config["activation"] == "quick_gelu",
        vision_cfg=dict(image_size=vision["image_size"], width=vision["width"], **towers),
        text_cfg=dict(
            vocab_size=text["vocab_size"],
            context_length=text["context_length"],
            width=text["width"],
            layers=text["layers"],
            heads=text["heads"],
            no_causal_mask=not text.get("causal", True),
            **({"pool_type": "last"} if text.get("pool") == "last" else {}),
            **({"pool_type": "eos", "eos_id": end} if end is not None else {}),
            **_their_sizes(text),
        ),
    )
    if "logit_bias" in variables["params"]:
        model["init_logit_bias"] = float(variables["params"]["logit_bias"])
    modes = {ours: theirs for theirs, ours in RESIZE_MODES.items()}
    fields = {key: value for key, value in preprocess.items() if key != "image_size"}
    weights: Mapping[str, np.ndarray] = to_theirs(layout(config), variables)
    write_model(
        Path(path),
        ("open_clip_model.safetensors", weights),
        {
            "open_clip_config.json": {
                "model_cfg": model,
                "preprocess_cfg": fields | {"resize_mode": modes[preprocess["resize_mode"]]},
            }
        },
    )


def _their_sizes(tower: Mapping[str, Any]) -> dict[str, Any]:
    """The feed-forward width as a ratio that open_clip truncates to it, and the norms' epsilon."""
    mlp_width = tower.get("mlp_width") or 4 * tower["width"]
    ratio = (mlp_width + 0.5) / tower["width"] if mlp_width % tower["width"] else mlp_width // tower["width"]
    return dict(mlp_ratio=float(ratio), norm_kwargs={"eps": tower.get("norm_epsilon", 1e-5)})
