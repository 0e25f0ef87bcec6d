"""The quickstart's Flamingo: its own CLIP's tower and its own language model, frozen, on emoji.

    python -m launch.train --config configs/flamingo/quickstart.py --workdir runs/quickstart/flamingo

Cost: about 4 minutes on 2 CPU cores. `configs/flamingo/quickstart.py:debug` takes seconds.
"""

import ml_collections

from configs.flamingo.common import emoji_data, flamingo_config, stream
from flamingo_jax.models.variants import get_variant


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = flamingo_config("emoji")
    emoji_data(config)
    config.steps = 800
    config.log_every = 10
    config.checkpoint_every = 100
    config.optimizer.lr = 3e-3
    config.optimizer.warmup_steps = 30
    config.optimizer.b2 = 0.98
    config.optimizer.decay = "cosine"
    config.init.vision = "runs/quickstart/clip"
    config.init.language_model = "runs/quickstart/language_model"
    config.data.tokenizer = "wordnet/tokenizer.json"
    config.evaluation.quick = 0  # the next stage evaluates
    # As in the paper, pages count most and clips least.
    config.data.mixture.pages = stream(images=5, frames=1, tokens=112, batch_size=8, weight=1.0)
    config.data.mixture.pairs = stream(images=1, frames=1, tokens=32, batch_size=16, weight=0.3)
    config.data.mixture.clips = stream(images=1, frames=4, tokens=32, batch_size=8, weight=0.1)
    if arg == "debug":
        config.model = get_variant("debug")
        config.steps = 4
        config.log_every, config.checkpoint_every, config.optimizer.warmup_steps = 1, 2, 1
        config.data.mixture.pages.batch_size = 8
        config.data.mixture.pairs.batch_size = 8
        config.data.mixture.clips.frames = 3
        config.evaluation.count, config.evaluation.quick, config.evaluation.captions = 8, 4, 8
        config.evaluation.batch_size = 8
    return config
