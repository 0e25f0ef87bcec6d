"""A small ResNet CLIP on the embedded emoji.

    python -m launch.train --config configs/clip/quickstart.py --workdir runs/quickstart/clip

Cost: about 6 minutes on 2 CPU cores. `configs/clip/quickstart.py:debug` takes seconds.
"""

import ml_collections

from configs.clip.common import clip_config, debug, emoji_data


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = clip_config("emoji-RN")
    emoji_data(config)
    config.batch_size = 256
    config.steps = 2000
    config.log_every = 10
    config.evaluate_every = 500
    config.checkpoint_every = 200
    config.optimizer.lr = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.98  # in a run this short 0.999 remembers too long
    config.data.augment.scale = (0.7, 1.0)
    config.data.keyword_rate = 0.2
    config.data.augment.jitter = 0.2
    config.data.augment.grayscale = 0.1
    return debug(config, "debug-RN") if arg == "debug" else config
