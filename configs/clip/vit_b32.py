"""CLIP ViT-B/32 from scratch at batch 32,768, on pairs of your own.

    python -m launch.plan --config configs/clip/vit_b32.py --topology v5e:2x4
    python -m launch.train --config configs/clip/vit_b32.py --workdir runs/vit_b32 \\
        --config.data.train="tar:laion400m/{00000..41407}.tar"

The smallest ViT of arXiv 2103.00020. As it is, it fits on 8 v5e chips: each embeds its 4,096 pairs in 32 parts, which
costs a third more operations; on more chips take fewer parts. `configs/clip/vit_b32.py:debug` takes seconds on a CPU,
on the embedded emoji. On v5e:2x4: 17.4 d, $4,012 by the plan, at best.
"""

import ml_collections

from configs.clip.common import debug, emoji_data, released


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = released("ViT-B/32")
    config.micro_batches = 32
    if arg == "debug":
        config.micro_batches = 1
        emoji_data(config)
        return debug(config, "debug-ViT")
    return config
