"""The table of named sizes of Flamingo, and the one place where a config becomes modules.

`heads` and `head_size` of a language model's gated blocks are those of arXiv 2204.14198, table 5, in its own sizes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections

from clip_jax.errors import ConfigError
from clip_jax.models import variants as clip_variants
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.language_model import DecoderSpec, LanguageModel
from flamingo_jax.models.resampler import PerceiverResampler

LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": dict(
        vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, rope_theta=100000.0
    ),
    # An embedding as large as what the blocks add to it: a gate that opens a little then changes little.
    "wordnet": dict(
        vocab_size=4096, width=192, layers=4, heads=6, kv_heads=6, mlp_width=512, tied=False, embedding_std=1.0
    ),
    "debug": dict(vocab_size=4096, width=32, layers=3, heads=4, kv_heads=2, mlp_width=64),
}

# name: (vision tower of the CLIP variant, language model, the trained parts)
FLAMINGOS: dict[str, tuple[str, str, dict[str, Any]]] = {
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
}


def get_language_model(name: str) -> ml_collections.ConfigDict:
    """The config of a named language model; every field can then be overridden."""
    if name not in LANGUAGE_MODELS:
        raise ConfigError(f"unknown language model {name!r}: expected one of {', '.join(LANGUAGE_MODELS)}")
    return ml_collections.ConfigDict(dataclasses.asdict(DecoderSpec(**LANGUAGE_MODELS[name])))


def get_variant(name: str) -> ml_collections.ConfigDict:
    """The config of a named Flamingo; every field can then be overridden."""
    if name not in FLAMINGOS:
        raise ConfigError(f"unknown Flamingo variant {name!r}: expected one of {', '.join(FLAMINGOS)}")
    vision, language_model, trained = FLAMINGOS[name]
    clip = clip_variants.get_variant(vision)
    config = ml_collections.ConfigDict(trained)
    config.vision, config.embed_dim, config.activation = clip.vision, clip.embed_dim, clip.activation
    config.language_model = get_language_model(language_model)
    config.remat = False
    config.dtype = "float32"  # compute dtype; what is trained is always float32
    return config


def build_language_model(config: Mapping[str, Any], dtype: str) -> LanguageModel:
    return LanguageModel(DecoderSpec(**dict(config)), dtype=jnp.dtype(dtype))


def build_flamingo(config: Mapping[str, Any]) -> Flamingo:
    """Modules from a config of `get_variant`'s shape."""
    dtype = jnp.dtype(config["dtype"])
    return Flamingo(
        vision=clip_variants.build_vision(config),
        resampler=PerceiverResampler(**dict(config["resampler"]), dtype=dtype),
        language_model=build_language_model(config["language_model"], config["dtype"]),
        interval=config["interval"],
        heads=config["heads"],
        head_size=config["head_size"],
        remat=config["remat"],
        dtype=dtype,
    )
