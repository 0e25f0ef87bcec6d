"""OpenFlamingo-9B: CLIP's ViT-L/14 and MPT-7B, frozen, trained on MMC4 and LAION of your own.

    python -m clip_jax.cli import openai:ViT-L-14.pt runs/vit-l-14
    python -m flamingo_jax.cli import hf:mpt-7b runs/mpt-7b
    python -m launch.plan --config configs/flamingo/open_flamingo_9b.py --topology v5e:16x16
    python -m launch.train --config configs/flamingo/open_flamingo_9b.py --workdir runs/open_flamingo_9b \\
        --config.init.vision=runs/vit-l-14 --config.init.language_model=runs/mpt-7b \\
        --config.data.tokenizer=runs/mpt-7b/checkpoints/00000000/tokenizer.json \\
        --config.data.mixture.pages.source="mmc4:mmc4/*.tar?min_similarity=0.24&min_bytes=10000" \\
        --config.data.mixture.pairs.source="tar:laion2b/{00000..231349}.tar"

On v5e:16x16: 0.4 d, $3,040 by the plan, at best. `configs/flamingo/open_flamingo_9b.py:debug` takes seconds.
"""

import ml_collections

from configs.flamingo.common import replica


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    return replica("OpenFlamingo-9B", images=6, bos="<|endoftext|>", arg=arg)
