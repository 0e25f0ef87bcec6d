"""Instruction tuning: a trained Flamingo learns to answer in chats; its language model by low-rank adapters only.

    python -m launch.train --config configs/flamingo/instruct.py --workdir runs/instruct \\
        --config.init.flamingo=runs/flamingo \\
        --config.data.mixture.chats.source=json:llava_instruct_150k.json#coco/train2017

The source is a file of chats, an object a line or LLaVA's published array, with the folder of its images after "#". The
loss is that of answers, and of the end after each. Sizes are those of SmolLM2-135M and the quickstart's tower: for
another Flamingo set `model` and `data.tokenizer` to its own. Cost: a step holds as many tokens as one of `smollm2.py`,
whose 500 steps take 33 minutes on 2 CPU cores; not measured. `configs/flamingo/instruct.py:debug` takes seconds. On
v5e:1x1: 12 s, less than $0.01 by the plan, at best.
"""

import ml_collections

from configs.flamingo.common import flamingo_config, stream
from flamingo_jax.models.variants import get_variant


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = flamingo_config("emoji-SmolLM2-135M")
    config.model.resampler = get_variant("emoji").resampler
    config.steps = 500
    config.log_every, config.checkpoint_every = 10, 50
    config.frozen_dtype = "bfloat16"
    config.adapters.patterns = ("language_model/blocks/(query|value)/",)  # as in most of arXiv 2106.09685
    config.optimizer.lr = 2e-4
    config.optimizer.warmup_steps = 20
    config.optimizer.b2 = 0.98
    config.optimizer.decay = "cosine"
    config.data.tokenizer, config.data.bos = "checkpoints/smollm2/tokenizer.json", "<|im_start|>"
    config.data.mixture.chats = stream(images=2, frames=1, tokens=128, batch_size=8, weight=1.0, kind="chats")
    config.evaluation.quick = 0
    if arg == "debug":
        config.model = get_variant("debug")
        config.steps = 4
        config.log_every, config.checkpoint_every, config.optimizer.warmup_steps = 1, 2, 1
        config.data.tokenizer, config.data.bos = "wordnet/tokenizer.json", "<|bos|>"
        config.data.mixture.chats.tokens, config.data.mixture.chats.batch_size = 48, 8
    return config
