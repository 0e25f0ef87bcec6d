"""Writes what the reader of archives is tested on: `python make.py`, in an environment with PyTorch (2.13.0)."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 2, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(2)
        self.proj = nn.Parameter(torch.randn(2, 3).T.contiguous().T)
        self.register_buffer("input_resolution", torch.tensor(4))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv1(image.float()).float()).mean((2, 3)) @ self.proj.float()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = Tower()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.linear(self.visual(image)) + self.mask[0, 0]


torch.manual_seed(0)
model = Model().eval()
state = model.state_dict()
np.savez(HERE / "expected.npz", **{key: value.numpy() for key, value in state.items()})
torch.save(state, HERE / "state_dict.pt")
torch.save(model.half().state_dict(), HERE / "half.pt")
model.float().load_state_dict(state)
torch.save(model.bfloat16().state_dict(), HERE / "bfloat16.pt")
model.float().load_state_dict(state)
torch.jit.trace(model, torch.zeros(1, 3, 4, 4)).save(HERE / "torchscript.pt")
