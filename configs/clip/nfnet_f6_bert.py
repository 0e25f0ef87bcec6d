"""Flamingo's own contrastive pair: NFNet-F6 and BERT, both mean-pooled (arXiv 2204.14198, appendix B).

    python -m launch.train --config configs/clip/nfnet_f6_bert.py --workdir runs/nfnet_f6_bert \
        --config.data.train=tfds:path/to/data_set/1.0.0#train --config.data.tokenizer=path/to/vocab.txt

Trains from scratch, on pairs of your own and with BERT's tokenizer (30,522 ids). To start from published towers:

    clip-jax import timm:dm_nfnet_f6.safetensors runs/f6 --image-size 288
    clip-jax import bert:bert-base-uncased runs/bert

and `--config.init.vision=runs/f6 --config.init.text=runs/bert`, with the tower's own preprocessing:
`--config.data.mean="(0.485,0.456,0.406)" --config.data.std="(0.229,0.224,0.225)"`.

Cost: a pod (549 million parameters, 16,384 pairs a step). `configs/clip/nfnet_f6_bert.py:debug` takes seconds. On
v5p:8x8x8: 0.4 d, $19,148 by the plan, at best; 5.6 GiB of each chip.
"""

import ml_collections

from configs.clip.common import adaptive_clipping, clip_config, debug, emoji_data


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = clip_config("nfnet_f6_bert")
    config.batch_size = 16384
    config.label_smoothing = 0.1
    config.mesh.replica, config.mesh.fsdp = -1, 64  # more do not divide the widths of its stages
    config.model.dtype = "bfloat16"
    config.model.vision.remat = config.model.text.remat = "full"
    config.optimizer.lr = 1e-3
    config.optimizer.warmup_steps = 0
    config.optimizer.decay = "linear"
    config.optimizer.weight_decay = 0.0
    # As in arXiv 2102.06171 §4, the last linear layer is not clipped adaptively; the global norm is BERT's and its.
    config.optimizer.agc = adaptive_clipping("vision/(?!projection)")
    config.optimizer.clip_norm = 10.0
    if arg == "debug":
        emoji_data(config)
        config.mesh.replica, config.mesh.fsdp = 1, -1
        return debug(config, "debug-NFNet")
    return config
