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
from flamingo_jax.models.resampler import Resampler

_CHINCHILLA = dict(vocab_size=32000, positions="relative", activation="gelu", norm_eps=1e-6)
_LLAMA = dict(vocab_size=32000, norm_eps=1e-6, tied=False)
_LLAMA3 = dict(vocab_size=128256, norm_eps=1e-5, rope_theta=500000.0, tied=False)
_LLAMA31 = dict(rope_scaling="llama3", rope_factor=8.0, rope_original=8192, rope_low=1.0, rope_high=4.0)
_MPT = dict(norm="layer", positions="alibi", activation="gelu")
_GPT2 = dict(vocab_size=50257, norm="layer", biases=True, positions="learned", max_positions=1024,
             activation="gelu_tanh")  # fmt: skip
_OPT = dict(vocab_size=50272, norm="layer", biases=True, positions="learned", max_positions=2048, position_offset=2,
            activation="relu")  # fmt: skip
_NEOX = dict(norm="layer", activation="gelu", biases=True, tied=False)
_PYTHIA = _NEOX | dict(vocab_size=50304, rotary_fraction=0.25, parallel_residual=True)


def _sizes(width: int, layers: int, heads: int, mlp_width: int = 0, kv_heads: int = 0) -> dict[str, Any]:
    """Without them: a feed-forward of 4·D, and a key/value head for each head."""
    return dict(width=width, layers=layers, heads=heads, kv_heads=kv_heads or heads, mlp_width=mlp_width or 4 * width)


LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    # arXiv 2203.15556, in the sizes of Flamingo's table 5.
    "Chinchilla-1.4B": _CHINCHILLA | _sizes(2048, 24, 16),
    "Chinchilla-7B": _CHINCHILLA | _sizes(4096, 40, 32),
    "Chinchilla-70B": _CHINCHILLA | _sizes(8192, 80, 64),
    # arXiv 2302.13971
    "LLaMA-7B": _LLAMA | _sizes(4096, 32, 32, 11008),
    "LLaMA-13B": _LLAMA | _sizes(5120, 40, 40, 13824),
    "LLaMA-30B": _LLAMA | _sizes(6656, 60, 52, 17920),
    "LLaMA-65B": _LLAMA | dict(norm_eps=1e-5) | _sizes(8192, 80, 64, 22016),
    # meta-llama/Llama-2-*-hf
    "LLaMA-2-7B": _LLAMA | dict(norm_eps=1e-5) | _sizes(4096, 32, 32, 11008),
    "LLaMA-2-13B": _LLAMA | dict(norm_eps=1e-5) | _sizes(5120, 40, 40, 13824),
    "LLaMA-2-70B": _LLAMA | dict(norm_eps=1e-5) | _sizes(8192, 80, 64, 28672, 8),
    # meta-llama/Meta-Llama-3-*, Llama-3.1-* and Llama-3.2-*
    "LLaMA-3-8B": _LLAMA3 | _sizes(4096, 32, 32, 14336, 8),
    "LLaMA-3-70B": _LLAMA3 | _sizes(8192, 80, 64, 28672, 8),
    "LLaMA-3.1-8B": _LLAMA3 | _LLAMA31 | _sizes(4096, 32, 32, 14336, 8),
    "LLaMA-3.1-70B": _LLAMA3 | _LLAMA31 | _sizes(8192, 80, 64, 28672, 8),
    "LLaMA-3.1-405B": _LLAMA3 | _LLAMA31 | _sizes(16384, 126, 128, 53248, 8),
    "LLaMA-3.2-1B": _LLAMA3 | _LLAMA31 | dict(rope_factor=32.0, tied=True) | _sizes(2048, 16, 32, 8192, 8),
    "LLaMA-3.2-3B": _LLAMA3 | _LLAMA31 | dict(rope_factor=32.0, tied=True) | _sizes(3072, 28, 24, 8192, 8),
    # mosaicml/mpt-1b-redpajama-200b, mosaicml/mpt-7b
    "MPT-1B": _MPT | dict(vocab_size=50368, qk_norm=True) | _sizes(2048, 24, 16),
    "MPT-7B": _MPT | dict(vocab_size=50432) | _sizes(4096, 32, 32),
    # openai-community/gpt2, gpt2-medium, …
    "GPT-2": _GPT2 | _sizes(768, 12, 12),
    "GPT-2-medium": _GPT2 | _sizes(1024, 24, 16),
    "GPT-2-large": _GPT2 | _sizes(1280, 36, 20),
    "GPT-2-xl": _GPT2 | _sizes(1600, 48, 25),
    # facebook/opt-*; opt-350m alone normalises after its blocks, which this decoder does not
    "OPT-125M": _OPT | _sizes(768, 12, 12),
    "OPT-1.3B": _OPT | _sizes(2048, 24, 32),
    "OPT-2.7B": _OPT | _sizes(2560, 32, 32),
    "OPT-6.7B": _OPT | _sizes(4096, 32, 32),
    "OPT-13B": _OPT | _sizes(5120, 40, 40),
    "OPT-30B": _OPT | _sizes(7168, 48, 56),
    "OPT-66B": _OPT | _sizes(9216, 64, 72),
    # EleutherAI/pythia-* (arXiv 2304.01373) and gpt-neox-20b
    "Pythia-70M": _PYTHIA | _sizes(512, 6, 8),
    "Pythia-160M": _PYTHIA | _sizes(768, 12, 12),
    "Pythia-410M": _PYTHIA | _sizes(1024, 24, 16),
    "Pythia-1B": _PYTHIA | _sizes(2048, 16, 8),
    "Pythia-1.4B": _PYTHIA | _sizes(2048, 24, 16),
    "Pythia-2.8B": _PYTHIA | _sizes(2560, 32, 32),
    "Pythia-6.9B": _PYTHIA | dict(vocab_size=50432) | _sizes(4096, 32, 32),
    "Pythia-12B": _PYTHIA | dict(vocab_size=50688) | _sizes(5120, 36, 40),
    "GPT-NeoX-20B": _PYTHIA | dict(vocab_size=50432) | _sizes(6144, 44, 64),
    # togethercomputer/RedPajama-INCITE-Base-3B-v1, a GPT-NeoX
    "RedPajama-INCITE-3B": _NEOX | dict(vocab_size=50432) | _sizes(2560, 32, 32),
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
    return dict(time_embedding=True, activation="squared_relu", qk_norm=False, kind="perceiver") | dict(fields)


def get_variant(name: str) -> ml_collections.ConfigDict:
    """The config of a named Flamingo; every field can then be overridden."""
    if name not in FLAMINGOS:
        raise ConfigError(f"unknown Flamingo variant {name!r}: expected one of {', '.join(FLAMINGOS)}")
    vision, language_model, trained = FLAMINGOS[name]
    clip = clip_variants.get_variant(vision)
    parts = {key: value for key, value in trained.items() if key != "image_size"}
    fields = dict(first_block=0, cross_attention="gated_dense", class_token=True, extra_tokens=1)
    config = ml_collections.ConfigDict(fields | parts)
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
    """Modules from a config of `get_variant`'s shape; fields that an older one lacks are the paper's.

    An `interval` of 0 means a single gated block, before the middle one of the language model's.
    """
    dtype = jnp.dtype(config["dtype"])
    layers, interval, first_block = config["language_model"]["layers"], config["interval"], config.get("first_block", 0)
    if not interval:
        interval, first_block = layers, layers // 2
    return Flamingo(
        vision=clip_variants.build_vision(config),
        resampler=Resampler(**dict(config["resampler"]), dtype=dtype),
        language_model=build_language_model(config["language_model"], config["dtype"]),
        interval=interval,
        heads=config["heads"],
        head_size=config["head_size"],
        gated_spec=GatedSpec(**dict(config.get("gated", {}))),
        first_block=first_block,
        cross_attention=config.get("cross_attention", "gated_dense"),
        class_token=config.get("class_token", True),
        extra_tokens=config.get("extra_tokens", 1),
        remat=config["remat"],
        dtype=dtype,
    )
