"""SigLIP B/16 from scratch (arXiv 2303.15343): the sigmoid loss at batch 32,768, on pairs of your own.

    python -m launch.plan --config configs/clip/siglip_b16.py --topology v5e:8x8
    python -m launch.train --config configs/clip/siglip_b16.py --workdir runs/siglip_b16 \\
        --config.data.tokenizer=path/to/spiece.model --config.data.train="tar:laion400m/{00000..41407}.tar"

Its tokenizer, of 32,000 pieces, is the file `spiece.model` of the released weights (extra `siglip`). 9 billion pairs,
AdamW in the place of the paper's Adafactor. `configs/clip/siglip_b16.py:debug` takes seconds on a CPU, on the embedded
emoji. On v5e:8x8: 3.1 d, $5,655 by the plan, at best.
"""

import ml_collections

from configs.clip.common import clip_config, debug, emoji_data


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = clip_config("SigLIP-B/16")
    config.loss = "sigmoid"
    config.steps = 274658
    config.data.templates = "openai80"
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.model.dtype = "bfloat16"
    config.model.vision.remat = config.model.text.remat = "full"
    config.optimizer.lr = 1e-3
    config.optimizer.warmup_steps = 20000
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.95  # 0.95: no spikes at this batch (section 4.5)
    config.optimizer.weight_decay = 1e-4
    if arg == "debug":
        emoji_data(config)
        return debug(config, "debug-ViT")
    return config
