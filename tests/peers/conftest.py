"""These tests need PyTorch, transformers and open_clip: `make test-peers`."""

import importlib
import sys

import torch


def import_torchvision() -> None:
    """open_clip needs torchvision's transforms; its compiled operators do not load beside another build of PyTorch.

    They are of no use here: declaring the two that torchvision registers shapes for is enough to import it.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            signature = f"torchvision::{name}"
            torch.library.define(signature, "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


import_torchvision()
