"""The table of named sizes, and the one place where a config becomes modules.

OpenAI's nine are those of arXiv 2103.00020, table 19 and 20; `emoji-*` are the same code, shrunk.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from clip_jax.errors import ConfigError
from clip_jax.models.resnet import ResNet
from clip_jax.models.text import TextTransformer
from clip_jax.models.two_tower import TwoTower
from clip_jax.models.vit import VisionTransformer

# name: (vision, text width and heads, joint width); a text tower has 12 layers, 77 tokens, 49,408 ids.
_OPENAI: dict[str, tuple[dict[str, Any], int, int, int]] = {
    "RN50": (dict(image_size=224, width=64, layers=(3, 4, 6, 3), heads=32), 512, 8, 1024),
    "RN101": (dict(image_size=224, width=64, layers=(3, 4, 23, 3), heads=32), 512, 8, 512),
    "RN50x4": (dict(image_size=288, width=80, layers=(4, 6, 10, 6), heads=40), 640, 10, 640),
    "RN50x16": (dict(image_size=384, width=96, layers=(6, 8, 18, 8), heads=48), 768, 12, 768),
    "RN50x64": (dict(image_size=448, width=128, layers=(3, 15, 36, 10), heads=64), 1024, 16, 1024),
    "ViT-B/32": (dict(image_size=224, patch_size=32, width=768, layers=12, heads=12), 512, 8, 512),
    "ViT-B/16": (dict(image_size=224, patch_size=16, width=768, layers=12, heads=12), 512, 8, 512),
    "ViT-L/14": (dict(image_size=224, patch_size=14, width=1024, layers=24, heads=16), 768, 12, 768),
    "ViT-L/14@336": (dict(image_size=336, patch_size=14, width=1024, layers=24, heads=16), 768, 12, 768),
}

VARIANTS: dict[str, dict[str, Any]] = {
    name: dict(
        vision=dict(kind="vit" if "patch_size" in vision else "resnet", **vision),
        text=dict(vocab_size=49408, context_length=77, width=width, layers=12, heads=heads, end_id=49407),
        embed_dim=embed_dim,
        activation="quick_gelu",
    )
    for name, (vision, width, heads, embed_dim) in _OPENAI.items()
}

_EMOJI_TEXT = dict(vocab_size=4096, context_length=12, width=128, layers=2, heads=4, end_id=4095)
VARIANTS["emoji-RN"] = dict(
    # Three stages: a fourth would leave a single place to pool from.
    vision=dict(kind="resnet", image_size=32, width=24, layers=(1, 1, 1), heads=6),
    text=_EMOJI_TEXT,
    embed_dim=256,
    activation="quick_gelu",
)
VARIANTS["emoji-ViT"] = dict(
    vision=dict(kind="vit", image_size=48, patch_size=8, width=128, layers=4, heads=4),
    text=_EMOJI_TEXT,
    embed_dim=256,
    activation="quick_gelu",
)
# The smallest of each kind, for configs called with "debug" and for tests.
_DEBUG_TEXT = dict(vocab_size=4096, context_length=16, width=32, layers=2, heads=4, end_id=4095)
VARIANTS["debug-RN"] = dict(
    vision=dict(kind="resnet", image_size=32, width=8, layers=(1, 1, 1, 1), heads=4),
    text=_DEBUG_TEXT,
    embed_dim=32,
    activation="quick_gelu",
)
VARIANTS["debug-ViT"] = dict(
    vision=dict(kind="vit", image_size=32, patch_size=8, width=32, layers=2, heads=4),
    text=_DEBUG_TEXT,
    embed_dim=32,
    activation="quick_gelu",
)

_TOWERS = {"vit": VisionTransformer, "resnet": ResNet}


def get_variant(name: str) -> ml_collections.ConfigDict:
    """The config of a named size; every field can then be overridden."""
    if name not in VARIANTS:
        raise ConfigError(f"unknown model variant {name!r}: expected one of {', '.join(VARIANTS)}")
    config = ml_collections.ConfigDict(VARIANTS[name])
    if config.vision.kind == "vit":
        config.vision.remat = "none"
    config.text.remat = "none"
    config.dtype = "float32"  # compute dtype; parameters are always float32
    return config


def build_vision(config: Mapping[str, Any]) -> nn.Module:
    """The vision tower of a config with `vision`, `embed_dim`, `activation` and `dtype`.

    Raises ConfigError for an unknown kind of tower.
    """
    vision = dict(config["vision"])
    kind = vision.pop("kind")
    if kind not in _TOWERS:
        raise ConfigError(f"model.vision.kind {kind!r}: expected one of {', '.join(_TOWERS)}")
    if kind == "vit":
        vision["activation"] = config["activation"]
    else:
        vision["layers"] = tuple(vision["layers"])
    return _TOWERS[kind](**vision, embed_dim=config["embed_dim"], dtype=jnp.dtype(config["dtype"]))


def build_two_tower(config: Mapping[str, Any]) -> TwoTower:
    """Modules from a config of `get_variant`'s shape. Raises ConfigError as `build_vision` does."""
    return TwoTower(
        vision=build_vision(config),
        text=TextTransformer(
            **dict(config["text"]),
            embed_dim=config["embed_dim"],
            activation=config["activation"],
            dtype=jnp.dtype(config["dtype"]),
        ),
    )
