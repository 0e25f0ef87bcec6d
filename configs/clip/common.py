"""The fields that every CLIP config has, with CLIP's own values (arXiv 2103.00020, appendix F)."""

import ml_collections

from clip_jax.models.variants import get_variant


def clip_config(variant: str) -> ml_collections.ConfigDict:
    """A full config for a named model; a config file changes what it wants other."""
    config = ml_collections.ConfigDict()
    config.task = "clip"
    config.seed = 0
    config.batch_size = 32768
    config.micro_batches = 1  # how many parts of a batch are embedded one after the other; the gradient is the same
    config.steps = 390625  # 12.8e9 pairs
    config.log_every = 50
    config.evaluate_every = 5000  # 0: at the end only
    config.checkpoint_every = 1000
    run_keys(config)
    config.evaluation_batch_size = 256

    config.loss = "softmax"  # or "sigmoid" (SigLIP)
    config.label_smoothing = 0.0  # softmax only
    config.model = get_variant(variant)
    config.frozen = ()  # patterns of paths that are not trained: ("vision/.*",)
    config.init = ml_collections.ConfigDict(
        {"vision": "", "text": "", "clip": ""}
    )  # workdirs or checkpoints to start from
    config.mesh = ml_collections.ConfigDict({"replica": 1, "fsdp": -1, "tensor": 1})  # -1: all devices left
    config.sharding_rules = ()  # ((logical axis, mesh axis), …) instead of clip_jax.sharding.DEFAULT_RULES

    config.data = data = ml_collections.ConfigDict()
    data.train = ""  # KIND:WHERE, see clip_jax.data.sources
    data.mixture = ml_collections.ConfigDict()  # or, in its place and batch_size's: name → `data_set`
    data.schedule = "accumulate"  # of the mixture's gradients; or "round_robin": each data set has a step in turn
    data.evaluate = ml_collections.ConfigDict()  # name → KIND:WHERE
    data.templates = "{}"  # of prompts: openai80, openai7, a text with {} or a file of one a line
    data.tokenizer = ""
    data.keyword_rate = 0.0
    data.group_by_text = False
    data.cache = False
    data.workers = 0  # processes that read and decode, on each host: up to its cores; 0: threads of the trainer
    data.threads = 8  # of each of them
    data.prefetch = 2
    data.max_rejected_share = 0.01
    data.mean = (0.48145466, 0.4578275, 0.40821073)
    data.std = (0.26862954, 0.26130258, 0.27577711)
    data.augment = ml_collections.ConfigDict(
        {"scale": (0.9, 1.0), "ratio": (0.75, 4 / 3), "rotate": 0.0, "jitter": 0.0, "grayscale": 0.0}
    )

    config.optimizer = optimizer = ml_collections.ConfigDict()
    optimizer.lr = 5e-4
    optimizer.warmup_steps = 2000
    optimizer.decay = "cosine"  # or "linear", "constant"
    optimizer.lr_factors = ()  # ((pattern for the start of paths, factor of their learning rate), …)
    optimizer.no_decay = ""  # a pattern for the start of paths without weight decay, beside gains and biases
    vit = config.model.vision.kind == "vit"
    optimizer.b1 = 0.9
    optimizer.b2 = 0.98 if vit else 0.999
    optimizer.eps = 1e-6 if vit else 1e-8
    optimizer.weight_decay = 0.2
    optimizer.clip_norm = 1.0  # of the global norm; 0: none
    optimizer.agc = adaptive_clipping()
    optimizer.max_logit_scale = 100.0
    return config


def released(variant: str) -> ml_collections.ConfigDict:
    """OpenAI's way to train one of their models, in bfloat16, on pairs of your own: appendix F, without the data."""
    config = clip_config(variant)
    config.data.tokenizer = "openai"
    config.data.templates = "openai80"
    config.model.dtype = "bfloat16"
    return config


def rematerialised(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The same config, keeping no more than each block's input for the backward pass, in towers that can."""
    for tower in (config.model.vision, config.model.text):
        if "remat" in tower:
            tower.remat = "full"
    return config


def run_keys(config: ml_collections.ConfigDict) -> None:
    """How a run survives and is watched; with other values of these, but for `spike_factor`, it may be resumed."""
    config.keep = 2  # newest checkpoints
    config.keep_every = 0  # and those of every so many steps; 0: none
    config.guard = ml_collections.ConfigDict(
        {
            "spike_factor": 0.0,  # skip updates whose gradient norm is so many times the running mean; 0: none
            "stop_after": 10,  # skipped updates in a row
        }
    )
    config.watchdog = ml_collections.ConfigDict(
        {
            "step_seconds": 900.0,  # that a step may take before the process ends; 0: any time
            "other_seconds": 7200.0,  # the same of compiling, restoring, evaluating, the last save
        }
    )
    config.profile = ml_collections.ConfigDict({"steps": ""})  # FIRST:LAST
    config.plan = ""  # what launch.plan --json wrote, to compare with; by default plan.json in the workdir, if any
    config.wandb = ml_collections.ConfigDict({"project": ""})  # Weights & Biases, too


def data_set(source: str, batch_size: int, weight: float) -> ml_collections.ConfigDict:
    """One of several data sets: where it is, how many pairs a step draws of it, the weight of their loss."""
    return ml_collections.ConfigDict({"source": source, "batch_size": batch_size, "weight": weight})


def adaptive_clipping(pattern: str = "") -> ml_collections.ConfigDict:
    """Of the parameters whose path begins as `pattern` says, instead of `clip_norm`; "" is none."""
    return ml_collections.ConfigDict({"pattern": pattern, "clipping": 0.01, "eps": 1e-3})


def emoji_data(config: ml_collections.ConfigDict) -> None:
    """The embedded emoji: seen styles and concepts to train on, Fluent and 200 concepts held out."""
    data = config.data
    data.train = "emoji:train"
    data.evaluate.held_out_style = "emoji:held_out_style"
    data.evaluate.unseen_concepts = "emoji:unseen_concepts"
    data.evaluate.unseen_concepts_held_out_style = "emoji:unseen_concepts_held_out_style"
    data.tokenizer = "emoji/tokenizer.json"
    data.keyword_rate = 0.5
    data.group_by_text = True  # one picture of a name in a batch: another style of it is no negative
    data.cache = True
    data.threads = 2
    data.mean = data.std = (0.5, 0.5, 0.5)


def baseline(config: ml_collections.ConfigDict, task: str) -> ml_collections.ConfigDict:
    """The same tower, data and budget with another objective: what CLIP's figure 2 compares."""
    config.task = task
    del config.loss, config.label_smoothing, config.init.text, config.init.clip
    return config


def debug(config: ml_collections.ConfigDict, variant: str) -> ml_collections.ConfigDict:
    """The same config with a model and a run that take seconds on a CPU."""
    config.model = get_variant(variant)
    config.batch_size, config.steps = 16, 4
    config.log_every, config.evaluate_every, config.checkpoint_every = 1, 0, 2
    config.optimizer.warmup_steps = 1
    return config
