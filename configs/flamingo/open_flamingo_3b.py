"""OpenFlamingo-3B: CLIP's ViT-L/14 and MPT-1B, frozen, trained on MMC4 and LAION of your own.

    python -m clip_jax.cli import openai:ViT-L-14.pt runs/vit-l-14
    python -m flamingo_jax.cli import hf:mpt-1b-redpajama-200b runs/mpt-1b-redpajama-200b
    python -m launch.plan --config configs/flamingo/open_flamingo_3b.py --topology v5e:8x8
    python -m launch.train --config configs/flamingo/open_flamingo_3b.py --workdir runs/open_flamingo_3b \\
        --config.init.vision=runs/vit-l-14 --config.init.language_model=runs/mpt-1b-redpajama-200b \\
        --config.data.tokenizer=runs/mpt-1b-redpajama-200b/checkpoints/00000000/tokenizer.json \\
        --config.data.mixture.pages.source="mmc4:mmc4/*.tar?min_similarity=0.24&min_bytes=10000" \\
        --config.data.mixture.pairs.source="tar:laion2b/{00000..231349}.tar"

On v5e:8x8: 0.5 d, $892 by the plan, at best. `configs/flamingo/open_flamingo_3b.py:debug` takes seconds.
"""

import ml_collections

from configs.flamingo.common import replica


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    return replica("OpenFlamingo-3B", images=6, bos="<|endoftext|>", arg=arg)
