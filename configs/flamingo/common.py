"""The fields that every Flamingo config and every config of a language model has."""

import ml_collections

from configs.clip.common import adaptive_clipping, run_keys
from flamingo_jax.models.variants import get_language_model, get_variant


def run_config(task: str) -> ml_collections.ConfigDict:
    """What the trainer itself asks for."""
    config = ml_collections.ConfigDict()
    config.task = task
    config.seed = 0
    config.steps = 500000
    config.log_every = 50
    config.evaluate_every = 0  # 0: at the end only
    config.checkpoint_every = 1000
    run_keys(config)
    config.mesh = ml_collections.ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})  # -1: all devices left
    config.sharding_rules = ()  # ((logical axis, mesh axis), …) instead of clip_jax.sharding.DEFAULT_RULES
    config.frozen = ()
    config.data = ml_collections.ConfigDict({"threads": 2, "prefetch": 2, "max_rejected_share": 0.01})
    config.optimizer = ml_collections.ConfigDict(
        {"lr": 1e-4, "warmup_steps": 5000, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0,
         "max_logit_scale": 100.0, "decay": "constant", "no_decay": "", "lr_factors": (), "agc": adaptive_clipping()}
    )  # fmt: skip
    return config


def flamingo_config(variant: str) -> ml_collections.ConfigDict:
    """A full config for a named Flamingo, with the paper's optimiser (arXiv 2204.14198, appendix B.2)."""
    config = run_config("flamingo")
    config.model = get_variant(variant)
    config.frozen = ("vision/", "language_model/")
    # Workdirs or checkpoints. The frozen parts need one; the resampler may start from another Flamingo's.
    config.init = ml_collections.ConfigDict({"vision": "", "language_model": "", "resampler": ""})
    config.optimizer.no_decay = "resampler/"
    data = config.data
    data.train = ""
    data.tokenizer, data.bos = "", "<|bos|>"
    data.mean = data.std = (0.5, 0.5, 0.5)
    data.next_rate = 0.0
    data.augment = ml_collections.ConfigDict(
        {"scale": (0.9, 1.0), "ratio": (0.9, 1.1), "rotate": 0.0, "jitter": 0.0, "grayscale": 0.0}
    )
    data.mixture = ml_collections.ConfigDict()  # stream → what a step draws of it
    config.evaluation = ml_collections.ConfigDict(
        {"source": "", "support": "", "shots": (0, 4), "count": 280, "quick": 40, "captions": 200, "batch_size": 32,
         "answer_tokens": 12, "tokens": {"shot": 24, "query": 32}}
    )  # fmt: skip
    return config


def stream(images: int, frames: int, tokens: int, batch_size: int, weight: float) -> ml_collections.ConfigDict:
    """A data set of the mixture: the room in its documents, how many a step draws, the weight of its loss."""
    return ml_collections.ConfigDict(
        {"images": images, "frames": frames, "tokens": tokens, "batch_size": batch_size, "weight": weight}
    )


def emoji_data(config: ml_collections.ConfigDict) -> None:
    """The embedded emoji as documents; asked about are concepts and a style that no training saw."""
    config.data.train = "emoji:train"
    config.evaluation.source = "emoji:unseen_concepts_held_out_style"
    config.evaluation.support = "emoji:train"


def language_model_config(name: str) -> ml_collections.ConfigDict:
    """A full config for pretraining a named language model on the embedded dictionary."""
    config = run_config("language_model")
    config.model = get_language_model(name)
    config.dtype = "float32"
    config.batch_size = 32
    config.data.train, config.data.evaluate = ("wordnet:train", "prompts:emoji:train"), "wordnet:held_out"
    config.data.tokenizer, config.data.bos = "wordnet/tokenizer.json", "<|bos|>"
    config.data.length = 128
    config.optimizer.decay = "cosine"
    return config
