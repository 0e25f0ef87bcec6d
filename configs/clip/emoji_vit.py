"""A small ViT CLIP on the embedded emoji.

    python -m launch.train --config configs/clip/emoji_vit.py --workdir runs/emoji_vit

Cost: about 7 minutes on 2 shared CPU cores, for its 300 steps. `configs/clip/emoji_vit.py:debug` takes seconds.
"""

import ml_collections

from configs.clip.common import clip_config, debug, emoji_data


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = clip_config("emoji-ViT")
    emoji_data(config)
    config.batch_size = 256
    config.steps = 300
    config.log_every = 10
    config.evaluate_every = 0
    config.checkpoint_every = 100
    config.optimizer.lr = 2e-3
    config.optimizer.warmup_steps = 50
    config.data.keyword_rate = 0.3
    config.data.augment.scale = (0.7, 1.0)
    config.data.augment.jitter = 0.2
    config.data.augment.grayscale = 0.1
    return debug(config, "debug-ViT") if arg == "debug" else config
