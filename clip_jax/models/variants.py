"""The table of named sizes, and the one place where a config becomes modules.

OpenAI's nine are those of arXiv 2103.00020, table 19 and 20; names without a slash are open_clip's
(model_configs/*.json), with GELU; SigLIP's are those of arXiv 2303.15343 and google/siglip-*; `nfnet_*_bert` are
Flamingo's own contrastive pair (arXiv 2204.14198, appendix B), with every NFNet of arXiv 2102.06171, table 1, and
BERT-base; `emoji-*` are the same code, shrunk.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import ml_collections

from clip_jax.errors import ConfigError
from clip_jax.models.bag_of_words import BagOfWords
from clip_jax.models.bert import Bert
from clip_jax.models.captioner import Captioner
from clip_jax.models.nfnet import NFNet
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

# name: (image and patch size; width, layers and heads of the vision tower, its feed-forward width where that is
# not 4 times the width; width, layers and heads of the text tower; joint width)
_OPEN_CLIP: dict[str, tuple[tuple[int, int], tuple[int, ...], tuple[int, int, int], int]] = {
    "ViT-S-32": ((224, 32), (384, 12, 6), (384, 12, 6), 384),
    "ViT-S-16": ((224, 16), (384, 12, 6), (384, 12, 6), 384),
    "ViT-M-32": ((224, 32), (512, 12, 8), (512, 12, 8), 512),
    "ViT-M-16": ((224, 16), (512, 12, 8), (512, 12, 8), 512),
    "ViT-B-32": ((224, 32), (768, 12, 12), (512, 12, 8), 512),
    "ViT-B-16": ((224, 16), (768, 12, 12), (512, 12, 8), 512),
    "ViT-B-16-plus-240": ((240, 16), (896, 12, 14), (640, 12, 10), 640),
    "ViT-L-14": ((224, 14), (1024, 24, 16), (768, 12, 12), 768),
    "ViT-L-14-336": ((336, 14), (1024, 24, 16), (768, 12, 12), 768),
    "ViT-H-14": ((224, 14), (1280, 32, 16), (1024, 24, 16), 1024),
    "ViT-H-14-378": ((378, 14), (1280, 32, 16), (1024, 24, 16), 1024),
    "ViT-g-14": ((224, 14), (1408, 40, 16, 6144), (1024, 24, 16), 1024),
    "ViT-bigG-14": ((224, 14), (1664, 48, 16, 8192), (1280, 32, 20), 1280),
}
for _name, ((_size, _patch), (_width, _layers, _heads, *_mlp), _text, _embed_dim) in _OPEN_CLIP.items():
    VARIANTS[_name] = dict(
        vision=dict(kind="vit", image_size=_size, patch_size=_patch, width=_width, layers=_layers, heads=_heads),
        text=dict(vocab_size=49408, context_length=77, end_id=49407, width=_text[0], layers=_text[1], heads=_text[2]),
        embed_dim=_embed_dim,
        activation="gelu",
    )
    if _mlp:
        VARIANTS[_name]["vision"]["mlp_width"] = _mlp[0]

# name: (image size, patch size, context length, size of both towers)
_SIGLIP_B = dict(width=768, layers=12, heads=12, mlp_width=3072)
_SIGLIP_L = dict(width=1024, layers=24, heads=16, mlp_width=4096)
_SIGLIP_SO400M = dict(width=1152, layers=27, heads=16, mlp_width=4304)
_SIGLIP: dict[str, tuple[int, int, int, dict[str, int]]] = {
    "SigLIP-B/16": (224, 16, 64, _SIGLIP_B),
    "SigLIP-B/16@256": (256, 16, 64, _SIGLIP_B),
    "SigLIP-L/16@256": (256, 16, 64, _SIGLIP_L),
    "SigLIP-So400m/14": (224, 14, 16, _SIGLIP_SO400M),
    "SigLIP-So400m/14@384": (384, 14, 64, _SIGLIP_SO400M),
}
for _name, (_size, _patch, _context, _tower) in _SIGLIP.items():
    VARIANTS[_name] = dict(
        vision=dict(kind="vit", image_size=_size, patch_size=_patch, pool="map", norm_epsilon=1e-6, **_tower),
        text=dict(
            vocab_size=32000, context_length=_context, pool="last", causal=False, projection_bias=True,
            norm_epsilon=1e-6, **_tower,
        ),
        embed_dim=_tower["width"],
        activation="gelu_tanh",
        init_logit_scale=math.log(10),
        init_logit_bias=-10.0,
    )  # fmt: skip

_NFNET = dict(kind="nfnet", image_size=288, channels=(256, 512, 1536, 1536), stem_width=128, group_size=128)
_BERT_BASE = dict(
    kind="bert", vocab_size=30522, context_length=64, positions=512, width=768, layers=12, heads=12, pad_id=0
)
for _i in range(7):
    VARIANTS[f"nfnet_f{_i}_bert"] = dict(
        vision=dict(layers=tuple(n * (_i + 1) for n in (1, 2, 6, 3)), **_NFNET),
        text=_BERT_BASE,
        embed_dim=1376,
        activation="gelu",
    )

_EMOJI_TEXT = dict(vocab_size=4096, context_length=12, width=128, layers=2, heads=4, end_id=4095)
VARIANTS["emoji-RN"] = dict(
    # Three stages: a fourth would leave a single place to pool from.
    vision=dict(kind="resnet", image_size=32, width=24, layers=(1, 1, 1), heads=6),
    text=_EMOJI_TEXT | dict(layers=1),  # names are short: the time is better spent on pictures
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
VARIANTS["debug-NFNet"] = dict(
    vision=dict(kind="nfnet", image_size=32, layers=(1, 3), channels=(16, 32), stem_width=16, group_size=8),
    text=dict(kind="bert", vocab_size=4096, context_length=16, positions=20, width=32, layers=2, heads=4, pad_id=0),
    embed_dim=32,
    activation="gelu",
)

_TOWERS = {"vit": VisionTransformer, "resnet": ResNet, "nfnet": NFNet}
_TEXT_TOWERS = {"gpt": TextTransformer, "bert": Bert}


def get_variant(name: str) -> ml_collections.ConfigDict:
    """The config of a named size; every field can then be overridden."""
    if name not in VARIANTS:
        raise ConfigError(f"unknown model variant {name!r}: expected one of {', '.join(VARIANTS)}")
    config = ml_collections.ConfigDict(VARIANTS[name])
    if config.vision.kind == "vit":
        config.vision.remat = "none"
        config.vision.patch_dropout = 0.0
    elif config.vision.kind == "nfnet":
        config.vision.remat = "none"
        config.vision.drop_path = 0.0
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
    for key in ("layers", "channels"):
        if isinstance(vision.get(key), list):
            vision[key] = tuple(vision[key])
    return _TOWERS[kind](**vision, embed_dim=config["embed_dim"], dtype=jnp.dtype(config["dtype"]))


def build_text(config: Mapping[str, Any]) -> nn.Module:
    """The text tower of a config with `text` (by default of kind gpt), `embed_dim`, `activation` and `dtype`.

    Raises ConfigError for an unknown kind of tower.
    """
    text = dict(config["text"])
    kind = text.pop("kind", "gpt")
    if kind not in _TEXT_TOWERS:
        raise ConfigError(f"model.text.kind {kind!r}: expected one of {', '.join(_TEXT_TOWERS)}")
    return _TEXT_TOWERS[kind](
        **text,
        embed_dim=config["embed_dim"],
        activation=config["activation"],
        dtype=jnp.dtype(config["dtype"]),
    )


def build_two_tower(config: Mapping[str, Any]) -> TwoTower:
    """Modules from a config of `get_variant`'s shape. Raises ConfigError as `build_vision` and `build_text` do."""
    return TwoTower(
        vision=build_vision(config),
        text=build_text(config),
        **{key: config[key] for key in ("init_logit_scale", "init_logit_bias") if key in config},
    )


def build_bag_of_words(config: Mapping[str, Any]) -> BagOfWords:
    """The vision tower with a head for the words that `text` has ids for."""
    return BagOfWords(build_vision(config), config["text"]["vocab_size"], jnp.dtype(config["dtype"]))


def build_captioner(config: Mapping[str, Any]) -> Captioner:
    """The vision tower and, of the text tower's sizes, a decoder that looks at it."""
    sizes = ("vocab_size", "context_length", "width", "layers", "heads", "mlp_width", "norm_epsilon", "remat")
    return Captioner(
        vision=build_vision(config),
        **{key: config["text"][key] for key in sizes if key in config["text"]},
        activation=config["activation"],
        dtype=jnp.dtype(config["dtype"]),
    )
