"""Flamingo-3B with one thing changed: the rows of the paper's ablation table (arXiv 2204.14198, table 3; v1, table 7).

    python -m launch.train --config configs/flamingo/ablations.py:vanilla --workdir runs/vanilla \\
        --config.init.vision=RUN --config.init.language_model=RUN --config.data.tokenizer=FILE \\
        --config.data.mixture.pages.source=json:FILE#FOLDER  (and .pairs, .clips)
    python -m launch.plan --config configs/flamingo/ablations.py:vanilla …

A row is also one override of any other Flamingo's config: --config.model.cross_attention=vanilla. Without a row the
config is the table's baseline. Parameters (billions) and score (overall, 4 shots) are the paper's.

    row                                                     override                        parameters  score
    (baseline)                                                                                     3.2   70.7
    no_gate          blocks added as they are               model.gated.gate=none                  3.2   66.5
    vanilla          attention within the LM's blocks       model.cross_attention=vanilla          2.4   66.9
    grafted          new blocks after the LM's              model.cross_attention=grafted          3.3   63.1
    single           one gated block, in the middle         model.interval=0                       2.0   59.8
    every_4th                                               model.interval=4                       2.3   68.8
    every_2nd                                               model.interval=2                       2.6   68.2
    mlp              for the resampler                      model.resampler.kind=mlp               3.2   66.6
    transformer      for the resampler                      model.resampler.kind=transformer       3.2   66.7
    next_0           texts attend the image before them     data.next_rate=0                       3.2   69.6
    next_1           texts attend the image after them      data.next_rate=1                       3.2   70.4
    all_previous     texts attend all images before them    data.attend=all                        3.2   63.5
    round_robin      a step for each data set in turn       data.schedule=round_robin              3.2   62.9
    clip_vit_l14     for the tower                          (model.vision)                         3.1   64.9
    nfnet_f0         for the tower                          (model.vision)                         2.9   62.7
    no_pages         pairs and clips alone                  (data.mixture)                         3.2   53.4
    lm_tuned         the LM is trained, too                 frozen=("vision/",)                    3.2   62.7

The MLP has 10 layers, for the resampler's number of parameters; the paper does not say how many blocks are grafted:
here 12 of each kind (`interval` 2), in all as many as the LM has, which makes 3.2 billion parameters, not 3.3. Other
rows have the paper's number to within 0.06 billion, those with another tower to within 0.11.
`model.resampler.latents` is another such field, without a row in the table.

Cost: that of Flamingo-3B, $3,891 for pages alone by the plan (see configs/README.md); in the paper a step of the
baseline took 1.74 s. `ablations.py:vanilla,debug` takes seconds.
"""

from typing import Any

import ml_collections

from clip_jax.errors import ConfigError
from clip_jax.models import variants as clip_variants
from configs.flamingo.common import flamingo_config, stream
from configs.flamingo.quickstart import get_config as quickstart

ROWS: dict[str, dict[str, Any]] = {
    "": {},
    "no_gate": {"model.gated.gate": "none"},
    "vanilla": {"model.cross_attention": "vanilla"},
    "grafted": {"model.cross_attention": "grafted", "model.interval": 2},
    "single": {"model.interval": 0},
    "every_4th": {"model.interval": 4},
    "every_2nd": {"model.interval": 2},
    "mlp": {"model.resampler.kind": "mlp", "model.resampler.layers": 10},
    "transformer": {"model.resampler.kind": "transformer"},
    "next_0": {"data.next_rate": 0.0},
    "next_1": {"data.next_rate": 1.0},
    "all_previous": {"data.attend": "all"},
    "round_robin": {"data.schedule": "round_robin"},
    "clip_vit_l14": {},
    "nfnet_f0": {},
    "no_pages": {},
    "lm_tuned": {"frozen": ("vision/",)},
}
# Row → the CLIP whose tower it has, and the one at debug size.
TOWERS = {"clip_vit_l14": ("ViT-L/14", "debug-ViT"), "nfnet_f0": ("nfnet_f0_bert", "debug-NFNet")}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """ROW, ROW,debug or debug. Raises ConfigError for an unknown row."""
    row, _, size = arg.rpartition(",") if arg.endswith("debug") else (arg, "", "")
    if row not in ROWS:
        raise ConfigError(f"ablation {row!r}: expected one of {', '.join(filter(None, ROWS))}, or one of them,debug")
    config = quickstart("debug") if size else baseline()
    config.update_from_flattened_dict(ROWS[row])
    if row in TOWERS:
        clip = clip_variants.get_variant(TOWERS[row][bool(size)])
        config.model.vision, config.model.activation = clip.vision, clip.activation
        config.model.embed_dim = clip.embed_dim
        if clip.vision.kind == "vit":
            config.model.vision.norm_tokens = False
    if row == "no_pages":
        del config.data.mixture.pages
    return config


def baseline() -> ml_collections.ConfigDict:
    """The paper's mixture and weights; the batches are ours."""
    config = flamingo_config("Flamingo-3B")
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.data.next_rate = 0.5
    config.data.mixture.pages = stream(images=5, frames=1, tokens=256, batch_size=256, weight=1.0, kind="interleaved")
    config.data.mixture.pairs = stream(images=1, frames=1, tokens=32, batch_size=512, weight=0.2, kind="pairs")
    config.data.mixture.clips = stream(images=1, frames=8, tokens=32, batch_size=64, weight=0.03, kind="clips")
    return config
