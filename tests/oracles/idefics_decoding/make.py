"""Writes what transformers' beam search finds with the weights of `../hf_idefics_float`, and what its samplers keep:
`python make.py`, in an environment with PyTorch and transformers.
"""

import sys
from pathlib import Path

import numpy as np

sys.modules["torchvision"] = None  # type: ignore[assignment]  # not needed, and it need not fit
import torch  # noqa: E402
from transformers import IdeficsForVisionText2Text  # noqa: E402
from transformers.generation.logits_process import (  # noqa: E402
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

HERE = Path(__file__).parent
IDEFICS = HERE.parent / "hf_idefics_float"
BEAMS, NEW, STOP, PENALTIES = 3, 10, [20, 8, 13], [-1.0, 0.0, 0.6, 1.0, 3.0]
SAMPLERS = [(0.7, 0, 1.0), (1.0, 9, 1.0), (1.3, 0, 0.8), (0.5, 20, 0.9)]  # temperature, top_k, top_p

model = IdeficsForVisionText2Text.from_pretrained(IDEFICS).eval()
inputs = {key: torch.tensor(value) for key, value in np.load(IDEFICS / "inputs.npz").items()}
inputs["input_ids"] = inputs["input_ids"].long()
P = inputs["input_ids"].shape[1]
tokens, scores = [], []
for penalty in PENALTIES:
    out = model.generate(
        **inputs, max_new_tokens=NEW, num_beams=BEAMS, length_penalty=penalty, eos_token_id=STOP, pad_token_id=STOP[0],
        do_sample=False, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    said = out.sequences[:, P:]
    tokens.append(np.pad(said.numpy(), ((0, 0), (0, NEW - said.shape[1])), constant_values=STOP[0]))
    scores.append(out.sequences_scores.numpy())
logits = torch.randn((5, 40), generator=torch.Generator().manual_seed(0)) * 2
kept = []
for temperature, top_k, top_p in SAMPLERS:
    restricted = TemperatureLogitsWarper(temperature)(None, logits)
    restricted = TopKLogitsWarper(top_k)(None, restricted) if top_k else restricted
    kept.append(TopPLogitsWarper(top_p)(None, restricted).numpy())
np.savez(
    HERE / "expected.npz", beams=BEAMS, stop_ids=STOP, length_penalty=np.array(PENALTIES, np.float32),
    tokens=np.array(tokens, np.int32), scores=np.array(scores), samplers=np.array(SAMPLERS), logits=logits.numpy(),
    restricted=np.array(kept),
)  # fmt: skip
