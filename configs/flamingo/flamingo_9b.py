"""Flamingo-9B: NFNet-F6 and a Chinchilla of 7 billion, frozen, trained on pages, pairs and clips of your own.

    python -m launch.plan --config configs/flamingo/flamingo_9b.py:pages --topology v5e:8x8
    python -m launch.train --config configs/flamingo/flamingo_9b.py --workdir runs/flamingo_9b \\
        --config.init.vision=runs/nfnet_f6_bert --config.init.language_model=path/to/checkpoint \\
        --config.data.tokenizer=path/to/tokenizer.json \\
        --config.data.mixture.pages.source=json:pages.jsonl#images --config.data.mixture.pairs.source=tfds:path#train \\
        --config.data.mixture.clips.source=json:clips.jsonl#videos

What it takes, the first command says: of pages alone, on which pairs and clips come on top.
`configs/flamingo/flamingo_9b.py:debug` takes seconds. On v5e:8x8: 6.9 d, $12,647 of pages alone by the plan, at best.
"""

import ml_collections

from configs.flamingo.common import paper


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    return paper("Flamingo-9B", pages=512, arg=arg)
