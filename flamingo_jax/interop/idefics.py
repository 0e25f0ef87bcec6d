"""IDEFICS (arXiv 2306.16527) as a Hugging Face directory (transformers: models/idefics), in and out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_jax.errors import CheckpointError
from clip_jax.interop import huggingface as clip_huggingface
from clip_jax.interop.imported import PREPROCESS, Fields, chosen_preprocess, require, write_model
from clip_jax.interop.mapping import Row, fill, norm, to_theirs
from clip_jax.interop.tensors import read_json, read_tensors
from flamingo_jax.data.conventions import SPECIAL_TOKENS, Convention
from flamingo_jax.data.tokenizer import TextTokenizer
from flamingo_jax.interop.families import FAMILIES
from flamingo_jax.interop.imported import ImportedFlamingo, PyTree, initial_params, require_same
from flamingo_jax.models.variants import language_model_fields

IGNORED = (*FAMILIES["llama"].ignore, r".*\.position_ids$")


def read_idefics(
    directory: str | Path,
    *,
    preprocess: str | Mapping[str, Any] | None = None,
    allow: Sequence[str] = (),
    allow_nan: bool = False,
) -> ImportedFlamingo:
    """A whole IDEFICS; its resampler looks at all of the tower's tokens before `ln_post`.

    Parameters keep the dtype they are stored in. Which images a token attends, the processor says: its
    `image_attention_mask` is the batch's `media_mask`.

    Args:
      preprocess: see `clip_jax.interop.huggingface.read_directory`; by default what preprocessor_config.json says,
        or transformers' default.
      allow, allow_nan: see `clip_jax.interop.mapping.fill` and `clip_jax.interop.tensors.read_tensors`.

    Raises:
      CheckpointError: a file or tensor is missing, damaged, left over, or of another shape, or config.json asks for
        what the model does not do.
    """
    directory = Path(directory)
    config = read_config(directory)

    def initial() -> PyTree:
        return initial_params(config)

    rows = layout(vector_gate=config["gated"]["vector_gate"])
    tensors = read_tensors(directory, allow_nan=allow_nan)
    params, report = fill(rows, initial, tensors, str(directory), allow=allow, ignore=IGNORED)
    fields = chosen_preprocess(_preprocess(directory), preprocess, config["vision"]["image_size"], str(directory))
    return ImportedFlamingo(config, {"params": params}, fields, report, "idefics")


def _preprocess(directory: Path) -> dict[str, Any]:
    """Images are squashed to a square (transformers: image_processing_idefics.py)."""
    fields = PREPROCESS["clip"] | {"resize_mode": "squash"}
    file = directory / "preprocessor_config.json"
    for key, value in (read_json(file) if file.is_file() else {}).items():
        if key in ("image_mean", "image_std"):
            if not (isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)):
                raise CheckpointError(f"{file}: {key} is {value!r}; three numbers expected")
            fields[key.removeprefix("image_")] = value
    return fields


def read_config(directory: str | Path) -> dict[str, Any]:
    """What a directory's config.json says, in `get_variant`'s shape. Raises CheckpointError as `read_idefics` does."""
    file = Path(directory) / "config.json"
    return model_fields(read_json(file), str(file))


def model_fields(config: Mapping[str, Any], label: str) -> dict[str, Any]:
    """What config.json says, in `get_variant`'s shape; absent fields have transformers' defaults.

    Raises CheckpointError for another architecture, and for what the model does not do.
    """
    values = Fields({key: value for key, value in config.items() if value is not None}, label)
    values.choice("model_type", {"idefics": "idefics"})
    values.only("use_resampler", True)
    values.only("tie_word_embeddings", False)
    eye, resampler = values.object("vision_config"), values.object("perceiver_config")
    language_model = FAMILIES["llama"].fields(values)
    return dict(
        vision=dict(
            kind="vit",
            pool="class",
            image_size=eye.integer("image_size", 224),
            patch_size=eye.integer("patch_size", 14),
            width=eye.integer("embed_dim", 768),
            layers=eye.integer("num_hidden_layers", 32),
            heads=eye.integer("num_attention_heads", 16),
            mlp_width=eye.integer("intermediate_size", 5120),
            norm_epsilon=eye.number("layer_norm_eps", 1e-5),
            norm_tokens=False,
            patch_dropout=0.0,
            remat="none",
        ),
        embed_dim=0,
        activation=eye.choice("hidden_act", clip_huggingface.ACTIVATIONS, "gelu"),
        dtype="float32",
        language_model=language_model_fields(language_model),
        interval=values.integer("cross_layer_interval", 1),
        first_block=0,
        heads=language_model["heads"],
        head_size=language_model["width"] // language_model["heads"],
        class_token=True,
        extra_tokens=values.integer("additional_vocab_size"),
        gated=dict(
            vector_gate=values.choice("alpha_type", {"float": False, "vector": True}, "float"),
            norm="rms",
            norm_eps=language_model["norm_eps"],
            media_norm=False,
            qk_norm=values.flag("qk_layer_norms", False),
            activation="swiglu",
            mlp_width=language_model["mlp_width"],
        ),
        resampler=dict(
            width=eye.integer("embed_dim", 768),
            layers=resampler.integer("resampler_depth", 6),
            heads=resampler.integer("resampler_n_heads", 16),
            head_size=resampler.integer("resampler_head_dim", 96),
            latents=resampler.integer("resampler_n_latents", 64),
            frames=1,
            time_embedding=False,
            activation="relu",
            qk_norm=resampler.flag("qk_layer_norms_perceiver", False),
        ),
        remat=False,
    )


def _heads(ours: str, theirs: str, out: str) -> list[Row]:
    """Linear maps without biases."""
    return [
        *(
            Row(f"{ours}/{name}/kernel", f"{theirs}.{name[0]}_proj.weight", "d h k -> (h k) d")
            for name in ("query", "key", "value")
        ),
        Row(f"{ours}/out/kernel", f"{theirs}.{out}.weight", "h k d -> d (h k)"),
        *norm(f"{ours}/query_norm", f"{theirs}.q_layer_norm"),
        *norm(f"{ours}/key_norm", f"{theirs}.k_layer_norm"),
    ]


def layout(vector_gate: bool) -> list[Row]:
    """The table of the whole model."""
    gated, blocks, gate = "model.gated_cross_attn_layers.*", "model.perceiver_resampler.blocks.*", "-> 1"
    if vector_gate:
        gate = "d -> 1 1 d"
    return [
        *(
            row._replace(ours=row.ours.removeprefix("params/"), theirs=f"model.{row.theirs}")
            for row in clip_huggingface.LAYOUTS["clip"]
            if row.ours.startswith("params/vision/")
        ),
        *(row._replace(ours=f"language_model/{row.ours}") for row in FAMILIES["llama"].layout("model.")),
        Row("extra_embedding", "model.embed_tokens.additional_embedding.weight"),
        Row("extra_head", "lm_head.additional_fc.weight"),
        Row("resampler/latents", "model.perceiver_resampler.latents"),
        *norm("resampler/blocks/features_norm", f"{blocks}.0.context_layer_norm"),
        *norm("resampler/blocks/latents_norm", f"{blocks}.0.latents_layer_norm"),
        *_heads("resampler/blocks", f"{blocks}.0", "output_proj"),
        *norm("resampler/blocks/mlp_norm", f"{blocks}.1.ln"),
        Row("resampler/blocks/mlp/up/kernel", f"{blocks}.1.fc.weight", "d m -> m d"),
        Row("resampler/blocks/mlp/down/kernel", f"{blocks}.1.c_proj.weight", "m d -> d m"),
        *norm("resampler/final_norm", "model.perceiver_resampler.layer_norm"),
        *norm("gated/text_norm", f"{gated}.input_layernorm"),
        *_heads("gated", f"{gated}.cross_attn", "o_proj"),
        *norm("gated/mlp_norm", f"{gated}.post_attention_layernorm"),
        *(
            Row(f"gated/mlp/{name}/kernel", f"{gated}.mlp.{name}_proj.weight", "d m -> m d")
            for name in ("gate", "up", "down")
        ),
        Row("gated/attention_gate", f"{gated}.alpha_cross_attn", gate),
        Row("gated/mlp_gate", f"{gated}.alpha_dense", gate),
    ]


def write_idefics(
    directory: str | Path,
    config: Mapping[str, Any],
    variables: PyTree,
    preprocess: Mapping[str, Any],
    tokenizer: TextTokenizer,
    convention: Convention,
) -> None:
    """Writes what transformers' `IdeficsForVisionText2Text` and `AutoProcessor` read, complete or not at all.

    Args: `config`, `variables` and `preprocess` as the fields of `ImportedFlamingo`.

    Raises ConfigError where the directory exists, or IDEFICS has no words for this model.
    """
    require(config["vision"]["kind"] == "vit", f"a tower of kind {config['vision']['kind']}: IDEFICS has vit only")
    require(convention.family == "idefics", f"a model that reads as {convention.family}: IDEFICS's ids are others")
    require(preprocess["resize_mode"] == "squash", f"images resized by {preprocess['resize_mode']}: IDEFICS squashes")
    require(preprocess["interpolation"] == "bicubic", f"{preprocess['interpolation']} pixels: IDEFICS's are bicubic")
    ids = dict(bos_token_id=convention.bos_id, eos_token_id=convention.end_id, pad_token_id=convention.pad_id)
    values = _their_config(config) | ids | {"dtype": str(variables["params"]["language_model"]["embedding"].dtype)}
    read = model_fields(values, "config.json")
    require_same(config, read | {"embed_dim": config["embed_dim"]}, "IDEFICS")
    params = {name: dict(value) if name == "vision" else value for name, value in variables["params"].items()}
    params["vision"].pop("projection", None)  # into a joint space that nothing here looks at
    special = [token for token in SPECIAL_TOKENS["idefics"].values() if token in tokenizer]
    tokens = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=tokenizer.bos,
        eos_token=SPECIAL_TOKENS["idefics"]["end"],
        pad_token=tokenizer.pad,
        additional_special_tokens=[token for token in special if token != SPECIAL_TOKENS["idefics"]["end"]],
    )
    size = preprocess["image_size"]
    images = dict(
        image_processor_type="IdeficsImageProcessor",
        processor_class="IdeficsProcessor",
        image_size=size,
        image_num_channels=3,
        image_mean=list(preprocess["mean"]),
        image_std=list(preprocess["std"]),
    )
    write_model(
        Path(directory),
        ("model.safetensors", to_theirs(layout(config["gated"].get("vector_gate", False)), params)),
        {
            "config.json": values,
            "preprocessor_config.json": images,
            "tokenizer.json": json.loads(tokenizer.canonical()),
            "tokenizer_config.json": {key: value for key, value in tokens.items() if value is not None},
        },
    )


def _their_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json in transformers 5's spelling; what cannot be said in it, it says as near as can be."""
    eye, lm, resampler = config["vision"], language_model_fields(config["language_model"]), config["resampler"]
    gated = config.get("gated", {})
    activations = {ours: theirs for theirs, ours in clip_huggingface.ACTIVATIONS.items()}
    return dict(
        model_type="idefics",
        architectures=["IdeficsForVisionText2Text"],
        vocab_size=lm["vocab_size"],
        additional_vocab_size=config["extra_tokens"],
        hidden_size=lm["width"],
        intermediate_size=lm["mlp_width"],
        num_hidden_layers=lm["layers"],
        num_attention_heads=lm["heads"],
        hidden_act="silu",
        rms_norm_eps=lm["norm_eps"],
        rope_parameters=dict(rope_type="default", rope_theta=lm["rope_theta"]),
        tie_word_embeddings=False,
        cross_layer_interval=config["interval"],
        qk_layer_norms=gated.get("qk_norm", False),
        alpha_type="vector" if gated.get("vector_gate") else "float",
        use_resampler=True,
        vision_config=dict(
            embed_dim=eye["width"],
            image_size=eye["image_size"],
            patch_size=eye["patch_size"],
            num_hidden_layers=eye["layers"],
            num_attention_heads=eye["heads"],
            intermediate_size=eye.get("mlp_width") or 4 * eye["width"],
            layer_norm_eps=eye.get("norm_epsilon", 1e-5),
            hidden_act=activations[config["activation"]],
        ),
        perceiver_config=dict(
            use_resampler=True,
            resampler_n_latents=resampler["latents"],
            resampler_depth=resampler["layers"],
            resampler_n_heads=resampler["heads"],
            resampler_head_dim=resampler["head_size"],
            qk_layer_norms_perceiver=resampler.get("qk_norm", False),
        ),
    )
