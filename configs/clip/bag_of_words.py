"""The quickstart's tower, data and budget, predicting bags of words: a baseline of CLIP's figure 2.

    python -m launch.train --config configs/clip/bag_of_words.py --workdir runs/bag_of_words
    python -m launch.evaluate --workdir runs/bag_of_words

Cost: about that of the quickstart's CLIP. `configs/clip/bag_of_words.py:debug` takes seconds.
"""

import ml_collections

from configs.clip.common import baseline
from configs.clip.quickstart import get_config as quickstart


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    return baseline(quickstart(arg), "bag_of_words")
