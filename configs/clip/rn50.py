"""CLIP RN50 from scratch at batch 32,768, on tars of img2dataset (CC12M, YFCC15M, LAION-400M, …).

    python -m launch.plan --config configs/clip/rn50.py --topology v5e:16x16
    python -m launch.train --config configs/clip/rn50.py --workdir runs/rn50 \\
        --config.data.train="tar:cc12m/{00000..01242}.tar"

Its BatchNorm statistics are those of the whole batch, so it is not cut into parts: take chips enough. On v5e:16x16: 0.6
d, $4,506 by the plan, at best. `configs/clip/rn50.py:debug` takes seconds on a CPU, on the embedded emoji.
"""

import ml_collections

from configs.clip.common import debug, emoji_data, released


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = released("RN50")
    if arg == "debug":
        emoji_data(config)
        return debug(config, "debug-RN")
    return config
