"""A CLIP of published weights, trained further on a folder of your own.

    python -m clip_jax.cli import openai:ViT-B-32.pt runs/vit-b-32
    python -m launch.train --config configs/clip/finetune.py --workdir runs/mine \\
        --config.init.clip=runs/vit-b-32 --config.data.train=folder:pictures --config.data.evaluate.mine=folder:held_out

The folder has a subfolder for each class, or captions beside the pictures; any other source will do. Of the same text
no two pictures are in a batch. `configs/clip/finetune.py:ViT-L/14` (any variant) is for another size, with
`--config.data.tokenizer` and, for SigLIP, `--config.loss=sigmoid`. All is trained, at a hundredth of the rate from
scratch; `--config.frozen="('vision/',)"` trains the text tower alone. `configs/clip/finetune.py:debug` takes seconds on
a CPU, from a run of `vit_b32.py:debug`. On v5e:1x1: 2.7 min, $0.05 by the plan, at best.
"""

import ml_collections

from configs.clip.common import debug, emoji_data, released, rematerialised


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = rematerialised(released("ViT-B/32" if arg in ("", "debug") else arg))
    config.batch_size = 256
    config.steps = 1000
    config.log_every, config.evaluate_every, config.checkpoint_every = 10, 250, 250
    config.data.group_by_text = True
    config.optimizer.lr = 5e-6
    config.optimizer.warmup_steps = 100
    if arg == "debug":
        emoji_data(config)
        return debug(config, "debug-ViT")
    return config
