"""Writes what the captioner is tested on, PyTorch's own decoder: `python make.py`, in an environment with PyTorch."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
D, H, M, LAYERS, V, L, N, B = 16, 2, 24, 2, 23, 6, 5, 3

torch.manual_seed(0)
layer = nn.TransformerDecoderLayer(D, H, M, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
decoder = nn.TransformerDecoder(layer, LAYERS, norm=nn.LayerNorm(D)).double().eval()
with torch.no_grad():
    for parameter in decoder.parameters():  # every layer other values, no bias 0, no gain 1
        parameter.add_(0.2 * torch.randn_like(parameter))
    embedding, position = torch.randn(V, D).double(), torch.randn(L, D).double()
    text, image = torch.randint(V, (B, L)), torch.randn(B, N, D).double()
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    logits = decoder(embedding[text] + position, image, tgt_mask=mask) @ embedding.T
weights = {key: value.numpy().astype(np.float32) for key, value in decoder.state_dict().items()}
inputs = {"embedding": embedding, "position": position, "image": image}
np.savez(HERE / "weights.npz", **weights)
np.savez(HERE / "inputs.npz", text=text.numpy(), **{k: v.numpy().astype(np.float32) for k, v in inputs.items()})
np.savez(HERE / "expected.npz", logits=logits.numpy())
