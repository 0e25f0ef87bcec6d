"""A CLIP run of seconds, for tests that start it often."""

import ml_collections

from configs.clip import emoji_vit


def get_config() -> ml_collections.ConfigDict:
    config = emoji_vit.get_config("debug")
    config.steps, config.evaluate_every = 12, 8
    del config.data.evaluate.held_out_style, config.data.evaluate.unseen_concepts_held_out_style
    return config
