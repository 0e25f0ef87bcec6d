"""Decoding against transformers itself: beam search on random prompts, with random lengths of padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from flamingo_jax import decoding
from flamingo_jax.interop.idefics import read_idefics
from flamingo_jax.models.variants import build_flamingo

ORACLES = Path(__file__).parent.parent / "oracles"
NEW = 9


@pytest.mark.parametrize("case", ["hf_idefics_float", "hf_idefics_vector"])
def test_beams_are_transformers(case: str) -> None:
    theirs: Any = transformers.IdeficsForVisionText2Text.from_pretrained(ORACLES / case).eval()
    ours = read_idefics(ORACLES / case)
    model, variables = build_flamingo(ours.config), decoding.unstack(ours.variables)
    rng = np.random.default_rng(0)
    B, P, T, V = 6, 12, 2, ours.config["language_model"]["vocab_size"]
    for penalty, stop in ((1.0, [9, 40]), (0.3, [20, 55]), (2.0, [1, 70])):
        mask = np.arange(P) >= rng.integers(0, P - 3, (B, 1))
        latest = np.arange(P) * (T + 1) // P  # nothing, then the first image, then the second
        theirs_in: dict[str, Any] = {
            "input_ids": rng.integers(3, V, (B, P)),
            "attention_mask": mask.astype(np.int64),
            "pixel_values": rng.normal(size=(B, T, 3, 28, 28)).astype(np.float32),
            "image_attention_mask": np.broadcast_to(latest[:, None] == np.arange(1, T + 1), (B, P, T)).astype(np.int64),
        }
        with torch.no_grad():
            expected = theirs.generate(
                **{key: torch.tensor(value) for key, value in theirs_in.items()}, max_new_tokens=NEW, num_beams=3,
                length_penalty=penalty, eos_token_id=stop, pad_token_id=stop[0], do_sample=False,
                return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
        batch = {
            "media": theirs_in["pixel_values"].transpose(0, 1, 3, 4, 2)[:, :, None],
            "frame_mask": np.ones((B, T, 1), bool),
            "text": theirs_in["input_ids"].astype(np.int32),
            "text_mask": mask,
            "media_mask": theirs_in["image_attention_mask"].astype(bool),
        }
        got = decoding.generate(
            model, variables, batch, max_new_tokens=NEW, num_beams=3, length_penalty=penalty, stop_ids=stop
        )
        said = expected.sequences[:, P:].numpy()
        np.testing.assert_array_equal(np.asarray(got.tokens)[:, : said.shape[1]], said)
        np.testing.assert_allclose(got.scores, expected.sequences_scores.numpy(), rtol=2e-5)
