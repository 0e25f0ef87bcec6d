"""Flamingo-80B: NFNet-F6 and a Chinchilla of 70 billion, frozen, trained on pages, pairs and clips of your own.

    python -m launch.plan --config configs/flamingo/flamingo_80b.py:pages --topology v5p:8x8x8
    python -m launch.train --config configs/flamingo/flamingo_80b.py --workdir runs/flamingo_80b \\
        --config.init.vision=runs/nfnet_f6_bert --config.init.language_model=path/to/checkpoint \\
        --config.data.tokenizer=path/to/tokenizer.json \\
        --config.data.mixture.pages.source=json:pages.jsonl#images --config.data.mixture.pairs.source=tfds:path#train \\
        --config.data.mixture.clips.source=json:clips.jsonl#videos

On v5p:8x8x8: 7.9 d, $405,686 of pages alone by the plan, at best; 2,048 of them a step take 13.9 GiB of each chip. 512
a step (`--topology v5e:16x16 --config.mesh.tensor=8 --config.data.mixture.pages.batch_size=512`) take 11.4 of a v5e
chip's 15.75 GiB. Pairs and clips come on top. `configs/flamingo/flamingo_80b.py:debug` takes seconds.
"""

import ml_collections

from configs.flamingo.common import paper


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = paper("Flamingo-80B", pages=2048, arg=arg)
    if arg != "debug":
        config.mesh.tensor = 4
    return config
