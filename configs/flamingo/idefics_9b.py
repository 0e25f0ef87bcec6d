"""IDEFICS-9B: OpenCLIP's ViT-H/14 and LLaMA-7B, frozen, trained on MMC4 and LAION of your own.

    python -m clip_jax.cli import open_clip:open_clip_pytorch_model.bin,open_clip_config.json runs/vit-h-14
    python -m flamingo_jax.cli import hf:llama-7b runs/llama-7b
    python -m launch.plan --config configs/flamingo/idefics_9b.py --topology v5e:16x16
    python -m launch.train --config configs/flamingo/idefics_9b.py --workdir runs/idefics_9b \\
        --config.init.vision=runs/vit-h-14 --config.init.language_model=runs/llama-7b \\
        --config.data.tokenizer=runs/llama-7b/checkpoints/00000000/tokenizer.json \\
        --config.data.mixture.pages.source="mmc4:mmc4/*.tar?min_similarity=0.24&min_bytes=10000" \\
        --config.data.mixture.pairs.source="tar:laion2b/{00000..231349}.tar"

On v5e:16x16: 0.4 d, $3,172 by the plan, at best. `configs/flamingo/idefics_9b.py:debug` takes seconds.
"""

import ml_collections

from configs.flamingo.common import replica


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    return replica("IDEFICS-9B", images=5, bos="<s>", arg=arg)
