"""The quickstart's language model: a small decoder on dictionary sentences, and on pages of
questions with blind answers, for Flamingo to freeze.

    python -m launch.train --config configs/flamingo/quickstart_lm.py --workdir runs/quickstart/language_model

Cost: about 3 minutes on 2 CPU cores. `configs/flamingo/quickstart_lm.py:debug` takes seconds.
"""

import ml_collections

from configs.flamingo.common import language_model_config
from flamingo_jax.models.variants import get_language_model


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = language_model_config("wordnet")
    config.steps = 360
    config.log_every = 10
    config.checkpoint_every = 100
    config.optimizer.lr = 3e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.b2 = 0.98
    if arg == "debug":
        config.model = get_language_model("debug")
        config.steps, config.batch_size, config.data.length = 4, 16, 16
        config.log_every, config.checkpoint_every, config.optimizer.warmup_steps = 1, 2, 1
    return config
