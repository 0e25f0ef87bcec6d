"""The tasks that a config can name."""

import ml_collections
from jax.sharding import Mesh

from clip_jax.errors import ConfigError
from clip_jax.training.task import Task


def build_task(config: ml_collections.ConfigDict, mesh: Mesh) -> Task:
    """The task that `config.task` names."""
    if config.task == "clip":
        from clip_jax.training.clip_task import ClipTask

        return ClipTask(config, mesh)
    if config.task == "bag_of_words":
        from clip_jax.training.bag_of_words_task import BagOfWordsTask

        return BagOfWordsTask(config, mesh)
    if config.task == "captioning":
        from clip_jax.training.captioning_task import CaptioningTask

        return CaptioningTask(config, mesh)
    if config.task == "language_model":
        from flamingo_jax.training.language_model_task import LanguageModelTask

        return LanguageModelTask(config, mesh)
    if config.task == "flamingo":
        from flamingo_jax.training.flamingo_task import FlamingoTask

        return FlamingoTask(config, mesh)
    raise ConfigError(f"task {config.task!r}: expected clip, bag_of_words, captioning, language_model or flamingo")
