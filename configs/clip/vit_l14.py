"""CLIP ViT-L/14 from scratch at batch 32,768, on tars of img2dataset (LAION-400M, LAION-2B, …).

    python -m launch.plan --config configs/clip/vit_l14.py --topology v5e:16x16
    python -m launch.train --config configs/clip/vit_l14.py --workdir runs/vit_l14 \\
        --config.data.train="tar:laion400m/{00000..41407}.tar"

On v5e:16x16: 3.9 d, $28,512 by the plan, at best. `configs/clip/vit_l14.py:debug` takes seconds on a CPU, on the
embedded emoji.
"""

import ml_collections

from configs.clip.common import debug, emoji_data, released


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = released("ViT-L/14")
    config.model.vision.remat = config.model.text.remat = "full"
    config.optimizer.lr = 4e-4  # arXiv 2103.00020, table 20
    if arg == "debug":
        emoji_data(config)
        return debug(config, "debug-ViT")
    return config
