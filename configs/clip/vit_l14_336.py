"""CLIP ViT-L/14@336 from scratch at batch 32,768, on pairs of your own.

    python -m launch.plan --config configs/clip/vit_l14_336.py --topology v5p:4x4x8
    python -m launch.train --config configs/clip/vit_l14_336.py --workdir runs/vit_l14_336 \\
        --config.data.train="tar:laion400m/{00000..41407}.tar"

The largest model of arXiv 2103.00020; there it saw 336 pixels in its last epoch only, and 224 before. As it is, it fits
on 128 v5p chips (29.8 of 95.7 GiB each) and on 256 v5e chips (14.4 of 15.75 GiB each), keeping no more than each
block's input. `configs/clip/vit_l14_336.py:debug` takes seconds on a CPU, on the embedded emoji. On v5p:4x4x8: 7.1 d,
$92,161 by the plan, at best. On v5e:16x16: 10.1 d, $74,341 by the plan, at best.
"""

import ml_collections

from configs.clip.common import debug, emoji_data, released


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = released("ViT-L/14@336")
    config.model.vision.remat = config.model.text.remat = "full"
    if arg == "debug":
        emoji_data(config)
        return debug(config, "debug-ViT")
    return config
