"""LiT (arXiv 2111.07991): a locked vision tower, and a new text tower that learns to name what it sees.

    python -m launch.train --config configs/clip/lit.py --workdir runs/lit

Needs the quickstart's CLIP in runs/quickstart/clip. Cost: minutes on 2 CPU cores; `:debug` takes seconds, with
`--config.init.vision` of a run of `configs/clip/quickstart.py:debug`. Any other tower comes by its variant's name:

    python -m clip_jax.cli import openai:ViT-B-32.pt runs/vit-b-32
    python -m launch.train --config configs/clip/lit.py:ViT-B/32 --workdir runs/lit \\
        --config.init.vision=runs/vit-b-32 --config.data.train=KIND:WHERE

On v5e:4x4: 1.2 d, $548 by the plan, at best.
"""

import ml_collections

from configs.clip.common import clip_config, rematerialised
from configs.clip.quickstart import get_config as quickstart


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    if arg in ("", "debug"):
        config = quickstart(arg)
        if not arg:
            config.steps = 500
        config.init.vision = "runs/quickstart/clip"
    else:
        config = rematerialised(clip_config(arg))
        config.data.tokenizer = "openai"
        config.model.dtype = "bfloat16"
        config.batch_size = 16384
        config.steps = 55000
        config.optimizer.lr = 1e-3
        config.optimizer.weight_decay = 1e-4
    config.frozen = ("vision/",)  # it is as in evaluation, has no gradient and no optimiser state
    return config
