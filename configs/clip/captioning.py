"""The quickstart's tower, data and budget, predicting captions token by token: a baseline of CLIP's figure 2.

    python -m launch.train --config configs/clip/captioning.py --workdir runs/captioning
    python -m launch.evaluate --workdir runs/captioning

Cost: about twice that of the quickstart's CLIP. `configs/clip/captioning.py:debug` takes seconds.
"""

import ml_collections

from configs.clip.common import baseline
from configs.clip.quickstart import get_config as quickstart


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = baseline(quickstart(arg), "captioning")
    del config.data.evaluate.held_out_style  # every name read for every picture, 4 million, takes a CPU minutes
    return config
