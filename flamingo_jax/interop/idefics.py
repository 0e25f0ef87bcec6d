"""IDEFICS (arXiv 2306.16527) from a Hugging Face directory (transformers: models/idefics)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_jax.interop import huggingface as clip_huggingface
from clip_jax.interop.imported import PREPROCESS, Fields
from clip_jax.interop.mapping import Row, fill, norm
from clip_jax.interop.tensors import read_json, read_tensors
from flamingo_jax.interop.families import FAMILIES
from flamingo_jax.interop.open_flamingo import ImportedFlamingo, PyTree, initial_params
from flamingo_jax.models.variants import language_model_fields

IGNORED = (*FAMILIES["llama"].ignore, r".*\.position_ids$")


def read_idefics(directory: str | Path, *, allow: Sequence[str] = (), allow_nan: bool = False) -> ImportedFlamingo:
    """A whole IDEFICS; its resampler looks at all of the tower's tokens before `ln_post`.

    Parameters keep the dtype they are stored in. Which images a token attends, the processor says: its
    `image_attention_mask` is the batch's `media_mask`.

    Args: `allow`, `allow_nan`: see `clip_jax.interop.mapping.fill` and `clip_jax.interop.tensors.read_tensors`.

    Raises:
      CheckpointError: a file or tensor is missing, damaged, left over, or of another shape, or config.json asks for
        what the model does not do.
    """
    directory = Path(directory)
    config = model_fields(read_json(directory / "config.json"), str(directory / "config.json"))

    def initial() -> PyTree:
        return initial_params(config)

    rows = layout(vector_gate=config["gated"]["vector_gate"])
    tensors = read_tensors(directory, allow_nan=allow_nan)
    params, report = fill(rows, initial, tensors, str(directory), allow=allow, ignore=IGNORED)
    preprocess = PREPROCESS["clip"] | {"image_size": config["vision"]["image_size"]}
    return ImportedFlamingo(config, {"params": params}, preprocess, report)


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
