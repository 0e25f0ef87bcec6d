"""The families of decoders that Hugging Face directories hold: what config.json says, and what tensors are called.

Names and defaults: transformers, `models/llama`, `gpt2`, `gpt_neox`, `opt` and `mpt`; MPT-1B's own code
(`mosaic_gpt`) uses others. Both spellings of config.json are read, that of transformers 5 (`rope_parameters`)
and the one before (`rope_theta`, `rotary_pct`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from clip_jax.interop.imported import Fields
from clip_jax.interop.mapping import Row, linear, merge_heads, norm, split_heads

GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
BLOCKS = "blocks"


class Family(NamedTuple):
    """`prefix` stands before every tensor's name but the head's (older files leave it out)."""

    prefix: str
    rows: tuple[Row, ...]
    head: str
    fields: Callable[[Fields], dict[str, Any]]
    ignore: tuple[str, ...] = ()  # buffers that follow from the config

    @property
    def embedding(self) -> str:
        return self.prefix + self.rows[0].theirs

    def layout(self, prefix: str) -> list[Row]:
        """All rows, with this prefix."""
        rows = [row._replace(theirs=prefix + row.theirs) for row in self.rows]
        return [*rows, Row("head", self.head)]


def _joint(theirs: str, kernel: str, bias: str) -> list[Row]:
    """Queries, keys and values in one matrix, whose dimension "n" counts them."""
    return [
        row
        for i, name in enumerate(("query", "key", "value"))
        for row in (
            Row(f"{BLOCKS}/{name}/kernel", f"{theirs}.weight", kernel, (i, 3)),
            Row(f"{BLOCKS}/{name}/bias", f"{theirs}.bias", bias, (i, 3)),
        )
    ]


def _untransposed(rows: Iterable[Row]) -> list[Row]:
    """GPT-2's linear maps are stored [in, out]."""
    flipped = {"d m -> m d": "d m -> d m", "h k d -> d (h k)": "h k d -> (h k) d"}
    return [row._replace(axes=flipped.get(row.axes, row.axes)) for row in rows]


_LLAMA = (
    Row("embedding", "embed_tokens.weight"),
    *norm(f"{BLOCKS}/attention_norm", "layers.*.input_layernorm"),
    *(
        row
        for name in ("query", "key", "value")
        for row in split_heads(f"{BLOCKS}/{name}", f"layers.*.self_attn.{name[0]}_proj")
    ),
    *merge_heads(f"{BLOCKS}/out", "layers.*.self_attn.o_proj"),
    *norm(f"{BLOCKS}/mlp_norm", "layers.*.post_attention_layernorm"),
    *(row for name in ("gate", "up", "down") for row in linear(f"{BLOCKS}/{name}", f"layers.*.mlp.{name}_proj")),
    *norm("final_norm", "norm"),
)

_GPT2 = (
    Row("embedding", "wte.weight"),
    Row("position_embedding", "wpe.weight"),
    *norm(f"{BLOCKS}/attention_norm", "h.*.ln_1"),
    *_joint("h.*.attn.c_attn", "d h k -> d (n h k)", "h k -> (n h k)"),
    *norm(f"{BLOCKS}/mlp_norm", "h.*.ln_2"),
    *_untransposed(
        [
            *merge_heads(f"{BLOCKS}/out", "h.*.attn.c_proj"),
            *linear(f"{BLOCKS}/up", "h.*.mlp.c_fc"),
            *linear(f"{BLOCKS}/down", "h.*.mlp.c_proj"),
        ]
    ),
    *norm("final_norm", "ln_f"),
)

_NEOX = (
    Row("embedding", "embed_in.weight"),
    *norm(f"{BLOCKS}/attention_norm", "layers.*.input_layernorm"),
    *_joint("layers.*.attention.query_key_value", "d h k -> (h n k) d", "h k -> (h n k)"),
    *merge_heads(f"{BLOCKS}/out", "layers.*.attention.dense"),
    *norm(f"{BLOCKS}/mlp_norm", "layers.*.post_attention_layernorm"),
    *linear(f"{BLOCKS}/up", "layers.*.mlp.dense_h_to_4h"),
    *linear(f"{BLOCKS}/down", "layers.*.mlp.dense_4h_to_h"),
    *norm("final_norm", "final_layer_norm"),
)

_OPT = (
    Row("embedding", "embed_tokens.weight"),
    Row("position_embedding", "embed_positions.weight"),
    *norm(f"{BLOCKS}/attention_norm", "layers.*.self_attn_layer_norm"),
    *(
        row
        for name in ("query", "key", "value")
        for row in split_heads(f"{BLOCKS}/{name}", f"layers.*.self_attn.{name[0]}_proj")
    ),
    *merge_heads(f"{BLOCKS}/out", "layers.*.self_attn.out_proj"),
    *norm(f"{BLOCKS}/mlp_norm", "layers.*.final_layer_norm"),
    *linear(f"{BLOCKS}/up", "layers.*.fc1"),
    *linear(f"{BLOCKS}/down", "layers.*.fc2"),
    *norm("final_norm", "final_layer_norm"),
)

_MPT = (
    Row("embedding", "wte.weight"),
    *norm(f"{BLOCKS}/attention_norm", "blocks.*.norm_1"),
    *_joint("blocks.*.attn.Wqkv", "d h k -> (n h k) d", "h k -> (n h k)"),
    *norm(f"{BLOCKS}/query_norm", "blocks.*.attn.q_ln"),
    *norm(f"{BLOCKS}/key_norm", "blocks.*.attn.k_ln"),
    *merge_heads(f"{BLOCKS}/out", "blocks.*.attn.out_proj"),
    *norm(f"{BLOCKS}/mlp_norm", "blocks.*.norm_2"),
    *linear(f"{BLOCKS}/up", "blocks.*.ffn.up_proj"),
    *linear(f"{BLOCKS}/down", "blocks.*.ffn.down_proj"),
    *norm("final_norm", "norm_f"),
)


def _mosaic_name(name: str) -> str:
    for new, old in ((".norm_", ".ln_"), ("norm_f", "ln_f"), ("ffn.up_proj", "mlp.mlp_up"),
                     ("ffn.down_proj", "mlp.mlp_down")):  # fmt: skip
        name = name.replace(new, old)
    return name


def _rope(config: Fields, older_theta: str = "rope_theta") -> tuple[dict[str, Any], Fields]:
    """(the fields of `DecoderSpec`, the object that says the rest). Of the scalings, "dynamic" and "longrope" change
    with the length of a text; they are refused.
    """
    said = config.object("rope_parameters" if "rope_parameters" in config.values else "rope_scaling")
    key = "rope_type" if "rope_type" in said.values else "type"
    kinds = {"default": "none"} | {name: name for name in ("linear", "llama3", "yarn")}
    kind = said.choice(key, kinds, "default")
    fields: dict[str, Any] = dict(rope_theta=said.number("rope_theta", config.number(older_theta, 10000.0)))
    if kind == "none":
        return fields, said
    factor = said.number("factor")
    fields |= dict(rope_scaling=kind, rope_factor=factor)
    if kind == "linear":
        return fields, said
    original = "original_max_position_embeddings"
    longest = said.integer(original, config.integer("max_position_embeddings", 2048))
    fields |= dict(rope_original=config.integer(original, longest))
    if kind == "llama3":
        fields |= dict(rope_low=said.number("low_freq_factor"), rope_high=said.number("high_freq_factor"))
    else:
        said.only("truncate", True)
        fields |= dict(rope_low=said.number("beta_slow", 1.0), rope_high=said.number("beta_fast", 32.0))
        scales = (said.number("mscale", 0.0), said.number("mscale_all_dim", 0.0))
        above, below = scales if all(scales) else (1.0, 0.0)
        magnitude = [1 + 0.1 * scale * math.log(max(factor, 1.0)) for scale in (above, below)]
        fields |= dict(rope_magnitude=said.number("attention_factor", magnitude[0] / magnitude[1]))
    return fields, said


def llama_fields(config: Fields) -> dict[str, Any]:
    width, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    config.only("hidden_act", "silu", "swish")
    config.only("attention_bias", False)
    config.only("mlp_bias", False)
    config.only("head_dim", width // heads)
    return dict(
        vocab_size=config.integer("vocab_size"),
        width=width,
        layers=config.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        mlp_width=config.integer("intermediate_size"),
        **_rope(config)[0],
        norm_eps=config.number("rms_norm_eps", 1e-6),
        tied=config.flag("tie_word_embeddings", False),
    )


def _gpt2_fields(config: Fields) -> dict[str, Any]:
    config.only("scale_attn_weights", True)
    config.only("scale_attn_by_inverse_layer_idx", False)
    config.only("add_cross_attention", False)
    width, heads = config.integer("n_embd", 768), config.integer("n_head", 12)
    return dict(
        vocab_size=config.integer("vocab_size", 50257),
        width=width,
        layers=config.integer("n_layer", 12),
        heads=heads,
        kv_heads=heads,
        mlp_width=config.integer("n_inner", 4 * width),
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        positions="learned",
        max_positions=config.integer("n_positions", 1024),
        activation=config.choice("activation_function", GELUS | {"relu": "relu"}, "gelu_new"),
        biases=True,
        tied=config.flag("tie_word_embeddings", True),
    )


def _neox_fields(config: Fields) -> dict[str, Any]:
    config.only("attention_bias", True)
    heads = config.integer("num_attention_heads", 64)
    fields, rope = _rope(config, "rotary_emb_base")
    return dict(
        vocab_size=config.integer("vocab_size", 50432),
        width=config.integer("hidden_size", 6144),
        layers=config.integer("num_hidden_layers", 44),
        heads=heads,
        kv_heads=heads,
        mlp_width=config.integer("intermediate_size", 24576),
        norm="layer",
        norm_eps=config.number("layer_norm_eps", 1e-5),
        **fields,
        rotary_fraction=rope.number("partial_rotary_factor", config.number("rotary_pct", 0.25)),
        activation=config.choice("hidden_act", GELUS, "gelu"),
        parallel_residual=config.flag("use_parallel_residual", True),
        biases=True,
        tied=config.flag("tie_word_embeddings", False),
    )


def _opt_fields(config: Fields) -> dict[str, Any]:
    config.only("do_layer_norm_before", True)
    config.only("_remove_final_layer_norm", False)
    config.only("enable_bias", True)
    config.only("layer_norm_elementwise_affine", True)
    width, heads = config.integer("hidden_size", 768), config.integer("num_attention_heads", 12)
    config.only("word_embed_proj_dim", width)
    return dict(
        vocab_size=config.integer("vocab_size", 50272),
        width=width,
        layers=config.integer("num_hidden_layers", 12),
        heads=heads,
        kv_heads=heads,
        mlp_width=config.integer("ffn_dim", 3072),
        norm="layer",
        positions="learned",
        max_positions=config.integer("max_position_embeddings", 2048),
        position_offset=2,
        activation=config.choice("activation_function", GELUS | {"relu": "relu"}, "relu"),
        biases=True,
        tied=config.flag("tie_word_embeddings", True),
    )


def _mpt_fields(config: Fields) -> dict[str, Any]:
    attention = config.object("attn_config")
    attention.only("alibi", True)
    attention.only("alibi_bias_max", 8)
    attention.only("attn_type", "multihead_attention")
    attention.only("prefix_lm", False)
    for fields, key in ((attention, "clip_qkv"), (attention, "softmax_scale"), (config, "logit_scale")):
        fields.only(key)
    config.only("no_bias", True)
    config.only("norm_type", "low_precision_layernorm", "layernorm")
    width, heads = config.integer("d_model", 2048), config.integer("n_heads", 16)
    return dict(
        vocab_size=config.integer("vocab_size", 50368),
        width=width,
        layers=config.integer("n_layers", 24),
        heads=heads,
        kv_heads=heads,
        mlp_width=config.integer("expansion_ratio", 4) * width,
        norm="layer",
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        qk_norm=attention.flag("qk_ln", False),
        positions="alibi",
        activation="gelu",
        tied=config.flag("tie_word_embeddings", True),
    )


def _mosaic_fields(config: Fields) -> dict[str, Any]:
    """The same, when attention's fields still stood beside the others."""
    values = dict(config.values)
    attention = {key: values[key] for key in ("alibi", "alibi_bias_max", "softmax_scale", "prefix_lm") if key in values}
    attention |= {key: values[f"attn_{key}"] for key in ("qk_ln", "clip_qkv") if f"attn_{key}" in values}
    attention.setdefault("alibi", False)  # the default then
    values |= {"attn_config": attention, "expansion_ratio": values.get("mlp_ratio", 4)}
    return _mpt_fields(Fields(values | {"no_bias": values.get("no_bias", False)}, config.label))


FAMILIES: Mapping[str, Family] = {
    "llama": Family("model.", _LLAMA, "lm_head.weight", llama_fields, (r".*rotary_emb\.inv_freq$",)),
    "gpt2": Family(
        "transformer.", _GPT2, "lm_head.weight", _gpt2_fields, (r".*\.attn\.(bias|masked_bias)$",)
    ),
    "gpt_neox": Family(
        "gpt_neox.", _NEOX, "embed_out.weight", _neox_fields,
        (r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",),
    ),
    "opt": Family("model.decoder.", _OPT, "lm_head.weight", _opt_fields),
    "mpt": Family("transformer.", _MPT, "lm_head.weight", _mpt_fields),
    "mosaic_gpt": Family(
        "transformer.",
        tuple(row._replace(theirs=_mosaic_name(row.theirs)) for row in _MPT),
        "lm_head.weight",
        _mosaic_fields,
    ),
}  # fmt: skip
