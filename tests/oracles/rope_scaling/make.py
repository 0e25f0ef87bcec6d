"""Writes what scaled rotary positions are tested on: `python make.py`, in an environment with transformers.

The logits of ../lm_llama's weights for texts longer than its (here) 16 original positions, one padded on the left, one
on the right; of each the last 6 tokens.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

HERE = Path(__file__).resolve().parent
LLAMA = HERE.parent / "lm_llama"
CASES = {
    "linear": dict(rope_type="linear", factor=2.5),
    "llama3": dict(
        rope_type="llama3", factor=4.0, low_freq_factor=0.1, high_freq_factor=0.5, original_max_position_embeddings=16
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, beta_fast=0.9, beta_slow=0.02, original_max_position_embeddings=16),
    "yarn_mscale": dict(
        rope_type="yarn", factor=4.0, mscale=0.7, mscale_all_dim=0.3, original_max_position_embeddings=16
    ),
}

ids = np.random.default_rng(0).integers(3, 95, (3, 60))
mask = np.ones((3, 60), np.int64)
mask[1, :9], mask[2, 50:] = 0, 0
last = np.array([59, 59, 49])[:, None] + np.arange(-5, 1)
position = np.maximum(mask.cumsum(1) - 1, 0)
expected: dict[str, Any] = {}
for name, rope in CASES.items():
    config = transformers.AutoConfig.from_pretrained(LLAMA)
    config.rope_parameters = {**rope, "rope_theta": 50000.0}
    model = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        arrays = (torch.from_numpy(x) for x in (ids, mask, position))
        logits = model(**dict(zip(("input_ids", "attention_mask", "position_ids"), arrays, strict=True))).logits.numpy()
    expected[name] = np.take_along_axis(logits, last[..., None], axis=1)
np.savez(HERE / "inputs.npz", ids=ids.astype(np.int32), mask=mask.astype(bool), last=last)
np.savez(HERE / "expected.npz", **expected)
(HERE / "cases.json").write_text(
    json.dumps({"transformers": transformers.__version__, "cases": CASES}, indent=2, sort_keys=True) + "\n"
)
