"""Flamingo on SmolLM2-135M-Instruct, frozen, with the quickstart's tower, on emoji.

    python -m launch.prepare smollm2 --output checkpoints/smollm2
    python -m launch.train --config configs/flamingo/smollm2.py --workdir runs/smollm2
    python -m launch.evaluate --workdir runs/smollm2

Needs the quickstart's CLIP and Flamingo in runs/quickstart, and the extra `import` for the first command. The resampler
starts from the quickstart's: without it, losses with right and other images were the same after 240 steps. Cost: about
33 minutes on 2 CPU cores. `configs/flamingo/smollm2.py:debug` takes seconds, on the `:debug` runs of the quickstart's
CLIP and Flamingo, with a language model of the same kind as small. On v5e:1x1: 14 s, less than $0.01 by the plan, at
best.
"""

import ml_collections

from configs.flamingo.common import debug, emoji_data, flamingo_config, stream
from flamingo_jax.models.variants import get_variant


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = flamingo_config("emoji-SmolLM2-135M")
    emoji_data(config)
    config.model.resampler = get_variant("emoji").resampler
    config.steps = 500
    config.log_every = 5
    config.checkpoint_every = 50
    config.optimizer.lr = 1e-3
    config.optimizer.warmup_steps = 10
    config.optimizer.b2 = 0.98
    config.optimizer.decay = "cosine"
    # SmolLM2's residual stream grows from 0.1 to 38 (rms), and gates stay near 0.01 at the others' rate.
    config.optimizer.lr_factors = (("gated/.*_gate$", 30.0),)
    config.init.vision = "runs/quickstart/clip"
    config.init.language_model = "checkpoints/smollm2"
    config.init.resampler = "runs/quickstart/flamingo"
    config.data.tokenizer, config.data.bos = "checkpoints/smollm2/tokenizer.json", "<|im_start|>"
    config.evaluation.quick = 0
    config.evaluation.count, config.evaluation.captions = 60, 60
    config.data.mixture.pages = stream(images=4, frames=1, tokens=96, batch_size=8, weight=1.0)
    config.data.mixture.pairs = stream(images=1, frames=1, tokens=32, batch_size=8, weight=0.3)
    config.data.mixture.clips = stream(images=1, frames=4, tokens=32, batch_size=2, weight=0.1)
    if arg == "debug":
        config.model.resampler = get_variant("debug").resampler  # that of the quickstart's debug, to start from
        return debug(config)
    return config
