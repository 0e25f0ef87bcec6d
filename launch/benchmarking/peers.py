"""What both designs' peers share: sizes, imports, and when tokens came."""

import importlib
import sys
import time
from typing import Any, NamedTuple

import numpy as np

IMAGES, SIZE, TOKENS, NEW = 5, 224, 160, 32


class Said(NamedTuple):
    """Seconds until the first token, and from there to the last one; and the tokens."""

    prefill: float
    decode: float
    tokens: np.ndarray


class Watch:
    """A transformers streamer: it is given the prompt, then every token as it is chosen.

    Prefill counts from when this is made, not from the prompt: open_flamingo looks at the images before `generate`
    gets that.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def said(self, tokens: np.ndarray) -> Said:
        return Said(self.times[1] - self.start, self.times[NEW] - self.times[1], tokens)


def import_peers() -> tuple[Any, Any]:
    """(torch, transformers). Both import torchvision, of which nothing is used here; where its operators do not fit
    this build of PyTorch, those that it registers shapes for are declared.
    """
    import torch

    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", signature)
        importlib.import_module("torchvision")
    import transformers

    return torch, transformers
