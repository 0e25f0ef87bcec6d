"""The table of named sizes of Flamingo, and the one place where a config becomes modules.

`heads` and `head_size` of a Flamingo are those of its gated blocks; `gated` says how these differ from the paper's.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from clip_jax.errors import ConfigError
from clip_jax.models import variants as clip_variants
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.gated_attention import GatedSpec
from flamingo_jax.models.language_model import DecoderSpec, LanguageModel
from flamingo_jax.models.resampler import PerceiverResampler

_CHINCHILLA = dict(vocab_size=32000, positions="relative", activation="gelu", norm_eps=1e-6)
_MPT = dict(norm="layer", positions="alibi", activation="gelu")


def _sizes(width: int, layers: int, heads: int, mlp_width: int) -> dict[str, Any]:
    return dict(width=width, layers=layers, heads=heads, kv_heads=heads, mlp_width=mlp_width)


LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    # arXiv 2203.15556, in the sizes of Flamingo's table 5.
    "Chinchilla-1.4B": _CHINCHILLA | _sizes(2048, 24, 16, 8192),
    "Chinchilla-7B": _CHINCHILLA | _sizes(4096, 40, 32, 16384),
    "Chinchilla-70B": _CHINCHILLA | _sizes(8192, 80, 64, 32768),
    # arXiv 2302.13971
    "LLaMA-7B": dict(vocab_size=32000, norm_eps=1e-6, tied=False) | _sizes(4096, 32, 32, 11008),
    "LLaMA-65B": dict(vocab_size=32000, norm_eps=1e-5, tied=False) | _sizes(8192, 80, 64, 22016),
    # mosaicml/mpt-1b-redpajama-200b, mosaicml/mpt-7b
    "MPT-1B": _MPT | dict(vocab_size=50368, qk_norm=True) | _sizes(2048, 24, 16, 8192),
    "MPT-7B": _MPT | dict(vocab_size=50432) | _sizes(4096, 32, 32, 16384),
    # togethercomputer/RedPajama-INCITE-Base-3B-v1, a GPT-NeoX
    "RedPajama-INCITE-3B": dict(vocab_size=50432, norm="layer", activation="gelu", biases=True, tied=False)
    | _sizes(2560, 32, 32, 10240),
    "SmolLM2-135M": dict(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, rope_theta=100000.0
    ),
    # An embedding as large as what the blocks add to it: a gate that opens a little then changes little.
    "wordnet": dict(
        vocab_size=4096, width=192, layers=4, heads=6, kv_heads=6, mlp_width=512, tied=False, embedding_std=1.0
    ),
    "debug": dict(vocab_size=4096, width=32, layers=3, heads=4, kv_heads=2, mlp_width=64),
}

# The trained parts: of the paper (table 5; keys and values are 128 wide), ...
_RESAMPLER = dict(width=1536, layers=6, heads=16, head_size=128, latents=64, frames=8)
# ... of OpenFlamingo (8 heads of 64 everywhere; the resampler is as wide as the tower, and sees single images), ...
_OPEN = dict(
    heads=8,
    head_size=64,
    class_token=False,
    extra_tokens=3,  # <|endofchunk|>, <image>, <PAD>
    gated=dict(media_norm=False, activation="gelu"),
    resampler=dict(
        width=1024, layers=6, heads=8, head_size=64, latents=64, frames=1, time_embedding=False, activation="gelu"
    ),
)
# ... and of IDEFICS.
_IDEFICS_RESAMPLER = dict(
    width=1280, layers=6, heads=16, head_size=96, latents=64, frames=1, time_embedding=False, activation="relu",
    qk_norm=True,
)  # fmt: skip
_IDEFICS_GATED = dict(norm="rms", media_norm=False, qk_norm=True, activation="swiglu")

_PAPER: dict[str, Any] = dict(image_size=320, head_size=128, resampler=_RESAMPLER)

# name: (vision tower of the CLIP variant, language model, the trained parts and perhaps other pixels)
FLAMINGOS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # arXiv 2204.14198, table 5; the tower is the contrastive pair's NFNet-F6, its 320² pixels become 10² tokens
    "Flamingo-3B": ("nfnet_f6_bert", "Chinchilla-1.4B", _PAPER | dict(interval=1, heads=16)),
    "Flamingo-9B": ("nfnet_f6_bert", "Chinchilla-7B", _PAPER | dict(interval=4, heads=32)),
    "Flamingo-80B": ("nfnet_f6_bert", "Chinchilla-70B", _PAPER | dict(interval=7, heads=64)),
    # arXiv 2308.01390, table 1; blocks stand before the last one of every interval
    "OpenFlamingo-3B": ("ViT-L/14", "MPT-1B", _OPEN | dict(interval=1, first_block=0)),
    "OpenFlamingo-4B": ("ViT-L/14", "RedPajama-INCITE-3B", _OPEN | dict(interval=2, first_block=1)),
    "OpenFlamingo-9B": ("ViT-L/14", "MPT-7B", _OPEN | dict(interval=4, first_block=3)),
    # huggingface.co/HuggingFaceM4/idefics-9b, idefics-80b
    "IDEFICS-9B": (
        "ViT-H-14",
        "LLaMA-7B",
        dict(
            interval=4, heads=32, head_size=128, extra_tokens=2, resampler=_IDEFICS_RESAMPLER,
            gated=_IDEFICS_GATED | dict(mlp_width=11008, norm_eps=1e-6),
        ),
    ),
    "IDEFICS-80B": (
        "ViT-H-14",
        "LLaMA-65B",
        dict(
            interval=4, heads=64, head_size=128, extra_tokens=2, resampler=_IDEFICS_RESAMPLER,
            gated=_IDEFICS_GATED | dict(mlp_width=22016, norm_eps=1e-5, vector_gate=True),
        ),
    ),
    "emoji": (
        "emoji-RN",
        "wordnet",
        dict(
            interval=2,
            heads=6,
            head_size=32,
            resampler=dict(width=128, layers=2, heads=4, head_size=32, latents=64, frames=4),
        ),
    ),
    "emoji-SmolLM2-135M": (
        "emoji-RN",
        "SmolLM2-135M",
        dict(
            interval=5,
            heads=9,
            head_size=64,
            resampler=dict(width=256, layers=2, heads=4, head_size=64, latents=64, frames=4),
        ),
    ),
    "debug": (
        "debug-RN",
        "debug",
        dict(
            interval=2,
            heads=2,
            head_size=16,
            resampler=dict(width=32, layers=2, heads=2, head_size=16, latents=8, frames=3),
        ),
    ),
}  # fmt: skip


def get_language_model(name: str) -> ml_collections.ConfigDict:
    """The config of a named language model; every field can then be overridden."""
    if name not in LANGUAGE_MODELS:
        raise ConfigError(f"unknown language model {name!r}: expected one of {', '.join(LANGUAGE_MODELS)}")
    return ml_collections.ConfigDict(language_model_fields(LANGUAGE_MODELS[name]))


def language_model_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a language model, from those that are not LLaMA's. Raises ConfigError as `DecoderSpec` does."""
    return dataclasses.asdict(DecoderSpec(**fields))


def resampler_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a resampler, from those that are not the paper's."""
    return dict(time_embedding=True, activation="squared_relu", qk_norm=False) | dict(fields)


def get_variant(name: str) -> ml_collections.ConfigDict:
    """The config of a named Flamingo; every field can then be overridden."""
    if name not in FLAMINGOS:
        raise ConfigError(f"unknown Flamingo variant {name!r}: expected one of {', '.join(FLAMINGOS)}")
    vision, language_model, trained = FLAMINGOS[name]
    clip = clip_variants.get_variant(vision)
    parts = {key: value for key, value in trained.items() if key != "image_size"}
    config = ml_collections.ConfigDict(dict(first_block=0, class_token=True, extra_tokens=1) | parts)
    config.gated = dataclasses.asdict(GatedSpec(**trained.get("gated", {})))
    config.resampler = resampler_fields(trained["resampler"])
    config.vision, config.embed_dim, config.activation = clip.vision, clip.embed_dim, clip.activation
    config.vision.image_size = trained.get("image_size", config.vision.image_size)
    if config.vision.kind == "vit":
        config.vision.norm_tokens = False
    config.language_model = get_language_model(language_model)
    config.remat = False
    config.dtype = "float32"  # compute dtype; what is trained is always float32
    return config


def build_language_model(config: Mapping[str, Any], dtype: str) -> LanguageModel:
    return LanguageModel(DecoderSpec(**dict(config)), dtype=jnp.dtype(dtype))


def build_flamingo(config: Mapping[str, Any]) -> Flamingo:
    """Modules from a config of `get_variant`'s shape; fields that an older one lacks are the paper's."""
    dtype = jnp.dtype(config["dtype"])
    return Flamingo(
        vision=clip_variants.build_vision(config),
        resampler=PerceiverResampler(**dict(config["resampler"]), dtype=dtype),
        language_model=build_language_model(config["language_model"], config["dtype"]),
        interval=config["interval"],
        heads=config["heads"],
        head_size=config["head_size"],
        gated_spec=GatedSpec(**dict(config.get("gated", {}))),
        first_block=config.get("first_block", 0),
        class_token=config.get("class_token", True),
        extra_tokens=config.get("extra_tokens", 1),
        remat=config["remat"],
        dtype=dtype,
    )
