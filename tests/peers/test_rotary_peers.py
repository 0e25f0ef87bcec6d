"""transformers' LLaMA with each scaling of its rotary positions, built on the spot: the same logits, or refused."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from clip_jax.errors import CheckpointError
from flamingo_jax.interop import huggingface
from flamingo_jax.models.language_model import LanguageModel

LLAMA: dict[str, Any] = dict(
    vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
)  # fmt: skip
LONG = dict(original_max_position_embeddings=32)
SCALINGS: list[dict[str, Any]] = [
    dict(rope_type="default"),
    dict(rope_type="linear", factor=4.0),
    dict(rope_type="llama3", factor=8.0, low_freq_factor=0.5, high_freq_factor=2.0, **LONG),
    dict(rope_type="yarn", factor=4.0, **LONG),
    dict(rope_type="yarn", factor=4.0, beta_fast=2.0, beta_slow=0.1, attention_factor=1.3, **LONG),
    dict(rope_type="yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.6, **LONG),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: ", ".join(map(str, scaling.values())))
def test_scaled_rotary_positions(scaling: dict[str, Any], tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**LLAMA, rope_parameters=scaling | {"rope_theta": 10000.0})
    torch.manual_seed(0)
    theirs: Any = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    text = torch.randint(0, 60, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(input_ids=text).logits.numpy()
    ours = huggingface.read(tmp_path)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(LanguageModel(ours.spec).apply)({"params": ours.params}, text.numpy().astype(np.int32))
    assert np.abs(np.asarray(got) - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_scalings_that_change_with_the_length_are_refused(kind: str, tmp_path: Path) -> None:
    factors = dict(short_factor=[1.0] * 8, long_factor=[2.0] * 8, **LONG)
    config = transformers.LlamaConfig(
        **LLAMA, rope_parameters=dict(rope_type=kind, rope_theta=10000.0, factor=2.0, **factors)
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"rope_type is '{kind}'; expected one of 'default', 'linear', 'llama3'"):
        huggingface.read(tmp_path)
