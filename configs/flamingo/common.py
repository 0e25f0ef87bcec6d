"""The fields that every Flamingo config and every config of a language model has."""

import ml_collections

from clip_jax.data.preprocess import MEAN, STD
from clip_jax.models import variants as clip_variants
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
    config.frozen = ()  # patterns of paths that are not trained; of several that match the last counts, "!" takes back
    config.data = ml_collections.ConfigDict({"workers": 0, "threads": 2, "prefetch": 2, "max_rejected_share": 0.01})
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
    config.frozen_dtype = "float32"  # "bfloat16" for the big ones; what is trained is always float32
    # Low-rank adapters: of which kernels ("language_model/blocks/(query|value)"), their width; scale alpha / rank.
    config.adapters = ml_collections.ConfigDict({"patterns": (), "rank": 8, "alpha": 16.0})
    # Workdirs or checkpoints. The frozen parts need one; the resampler, or all at once, may be another Flamingo's.
    config.init = ml_collections.ConfigDict({"vision": "", "language_model": "", "resampler": "", "flamingo": ""})
    config.optimizer.no_decay = "resampler/"
    data = config.data
    data.train = ""
    data.tokenizer, data.bos = "", "<|bos|>"
    data.mean = data.std = (0.5, 0.5, 0.5)
    data.attend = "previous"  # φ: the image that a token sees, or "all" before it
    data.next_rate = 0.0  # how often an interleaved page's texts see the next one instead; the paper's is 0.5
    data.space_rate = 0.0  # how often a page's texts begin with a space; the paper's is 0.5
    data.augment = ml_collections.ConfigDict(
        {"scale": (0.9, 1.0), "ratio": (0.9, 1.1), "rotate": 0.0, "jitter": 0.0, "grayscale": 0.0, "saturation": 0.0,
         "flip": 0.0}
    )  # fmt: skip
    data.mixture = ml_collections.ConfigDict()  # name → `stream`
    data.schedule = "accumulate"  # of the mixture's gradients; or "round_robin": each data set has a step in turn
    config.evaluation = ml_collections.ConfigDict(
        {"source": "", "support": "", "shots": (0, 4), "count": 280, "quick": 40, "captions": 200, "batch_size": 32,
         "answer_tokens": 12, "tokens": {"shot": 24, "query": 32}}
    )  # fmt: skip
    return config


def stream(
    images: int, frames: int, tokens: int, batch_size: int, weight: float, *, kind: str = "emoji", source: str = "",
    features: str = "",
) -> ml_collections.ConfigDict:  # fmt: skip
    """A data set of the mixture: the room in its documents, how many a step draws, the weight of its loss.

    `kind` and `source`: see `flamingo_jax.data.pages.open_pages`; "emoji" is made of the pictures of `data.train`.
    `features`: a directory of `python -m launch.prepare features`, read instead of pixels.
    """
    return ml_collections.ConfigDict(
        {"kind": kind, "source": source, "features": features, "images": images, "frames": frames, "tokens": tokens,
         "batch_size": batch_size, "weight": weight}
    )  # fmt: skip


def paper(variant: str, pages: int, arg: str = "") -> ml_collections.ConfigDict:
    """A config for one of the paper's sizes at so many pages a step, on data of your own (appendix B.2).

    Pages are M3W's, with its up to 5 images and 256 tokens; pairs stand for ALIGN and LTIP together, at a weight of 0.2
    each; clips are VTP's. `arg`: "pages" leaves the others out.
    """
    config = flamingo_config(variant)
    config.frozen_dtype = "bfloat16"
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.data.next_rate = 0.5
    config.data.mixture.pages = stream(images=5, frames=1, tokens=256, batch_size=pages, weight=1.0, kind="interleaved")
    if arg != "pages":
        config.data.mixture.pairs = stream(
            images=1, frames=1, tokens=32, batch_size=2 * pages, weight=0.4, kind="pairs"
        )
        config.data.mixture.clips = stream(
            images=1, frames=8, tokens=32, batch_size=pages // 4, weight=0.03, kind="clips"
        )
    return debug(config) if arg == "debug" else config


def replica(variant: str, images: int, bos: str, arg: str = "") -> ml_collections.ConfigDict:
    """A config for one of the paper's open replicas: MMC4's pages with so many images, LAION's pairs.

    Batches, weights, rates and length are those of OpenFlamingo's published training command: 60 million pages and
    120 million pairs (arXiv 2308.01390). Of the language model's embeddings the added tokens' are trained.
    """
    config = flamingo_config(variant)
    config.frozen_dtype = "bfloat16"
    config.model.dtype = "bfloat16"
    config.model.remat = True
    config.steps = 58594
    config.optimizer.warmup_steps = 1875
    config.data.mean, config.data.std = MEAN, STD
    config.data.bos = bos
    config.data.mixture.pages = stream(
        images=images, frames=1, tokens=256, batch_size=1024, weight=1.0, kind="interleaved"
    )
    config.data.mixture.pairs = stream(images=1, frames=1, tokens=32, batch_size=2048, weight=0.2, kind="pairs")
    return debug(config) if arg == "debug" else config


def debug(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same config, its modules as they are but small, for a run of seconds on a CPU on the embedded emoji.

    Needs `init.vision`, of a run of a CLIP config's debug, and `init.language_model` as small as this one's.
    """
    small, model = get_variant("debug"), config.model
    names = {"vit": "debug-ViT", "resnet": "debug-RN", "nfnet": "debug-NFNet"}
    tower = clip_variants.get_variant(names[model.vision.kind])
    model.vision.update(tower.vision)
    model.embed_dim, model.activation = tower.embed_dim, tower.activation
    for key in ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width"):
        model.language_model[key] = small.language_model[key]
    model.language_model.layers = max(model.language_model.layers, model.first_block + 1)
    model.heads, model.head_size = small.heads, small.head_size
    if model.gated.mlp_width:
        model.gated.mlp_width = small.language_model.mlp_width
    for key in ("width", "layers", "heads", "head_size", "latents"):
        model.resampler[key] = small.resampler[key]
    config.steps = 2
    config.log_every, config.checkpoint_every, config.optimizer.warmup_steps = 1, 2, 1
    emoji_data(config)
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    config.data.tokenizer, config.data.bos = "wordnet/tokenizer.json", "<|bos|>"
    for part in config.data.mixture.values():
        part.update(dict(kind="emoji", batch_size=8, tokens=min(part.tokens, 48), frames=min(part.frames, 2)))
    config.evaluation.quick = 0
    return config


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
