"""CLIP ViT-B/16 from scratch at batch 32,768, on tars of img2dataset (LAION-400M, CC12M, …).

    python -m launch.plan --config configs/clip/vit_b16.py --topology v5e:8x8
    python -m launch.train --config configs/clip/vit_b16.py --workdir runs/vit_b16 \\
        --config.data.train="tar:laion400m/{00000..41407}.tar"

On v5e:8x8: 4.1 d, $7,534 by the plan, at best. `configs/clip/vit_b16.py:debug` takes seconds on a CPU, on the embedded
emoji.
"""

import ml_collections

from configs.clip.common import debug, emoji_data, released


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = released("ViT-B/16")
    config.model.vision.remat = config.model.text.remat = "full"
    if arg == "debug":
        emoji_data(config)
        return debug(config, "debug-ViT")
    return config
