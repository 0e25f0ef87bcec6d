"""transformers' IDEFICS, built on the spot with random weights: into ours, compared, out again, compared; and files
that PyTorch reads.
"""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from flamingo_models import IDEFICS_TOKENS, OPEN_FLAMINGO, ORACLES, arguments, write_tokenizer
from transformers.models.idefics import processing_idefics

import flamingo_jax
from clip_jax.interop.tensors import read_tensors
from flamingo_jax.data.conventions import Convention
from flamingo_jax.interop import commands, published
from flamingo_jax.interop.open_flamingo import write_open_flamingo

IMAGE, END = 61, 2


def idefics(alpha_type: str) -> Any:
    """Weights at which nothing is degenerate."""
    config = transformers.IdeficsConfig(
        vocab_size=60, additional_vocab_size=3, hidden_size=48, intermediate_size=72, num_hidden_layers=4,
        num_attention_heads=3, cross_layer_interval=2, qk_layer_norms=True, use_resampler=True, alpha_type=alpha_type,
        vision_config=dict(
            embed_dim=32, image_size=28, patch_size=7, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
        ),
        perceiver_config=dict(
            use_resampler=True, resampler_n_latents=5, resampler_depth=2, resampler_n_heads=3, resampler_head_dim=8,
            qk_layer_norms_perceiver=True,
        ),
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.IdeficsForVisionText2Text(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = 1.0 if "alpha" in name else (value.shape[-1] if value.ndim > 1 else 25) ** -0.5
            value.copy_(torch.randn(value.shape) * scale + (value == 1))
    return model.eval()


def prompts() -> dict[str, torch.Tensor]:
    """Two images; one, left-padded; none."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 59, (3, 12), generator=generator)
    for row, place in ((0, 2), (0, 7), (1, 6)):
        ids[row, place] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, :4], ids[1, :4] = 0, 0
    pixels = torch.randn((3, 2, 3, 28, 28), generator=generator)
    pixels[1, 1] = 0
    return dict(input_ids=ids, attention_mask=mask, pixel_values=pixels)


class Tokenizer:
    eos_token_id = END

    def convert_tokens_to_ids(self, token: str) -> int:
        assert token == "<image>"
        return IMAGE


def their_mask(ids: torch.Tensor, images: int) -> torch.Tensor:
    counts, _ = processing_idefics.image_attention_mask_for_packed_input_ids_pt(ids, Tokenizer())
    return processing_idefics.incremental_to_binary_attention_mask(counts, "pt", num_classes=images)


@pytest.mark.parametrize("alpha_type", ["float", "vector"])
def test_idefics(alpha_type: str, tmp_path: Path) -> None:
    theirs = idefics(alpha_type)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="100KB")
    assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 1
    write_tokenizer(tmp_path / "in", 60, IDEFICS_TOKENS, bos_token="<s>", pad_token="w0")
    inputs = prompts()
    inputs["image_attention_mask"] = their_mask(inputs["input_ids"], 2)
    with torch.no_grad():
        expected = theirs(**inputs).logits
        said = theirs.generate(**inputs, max_new_tokens=10, do_sample=False)[:, 12:]
    model = flamingo_jax.load(f"idefics:{tmp_path / 'in'}")
    assert not model.report.missing and not model.report.unused
    batch = model.make_batch(inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"])
    mask = batch["text_mask"]
    np.testing.assert_array_equal(batch["media_mask"], inputs["image_attention_mask"].numpy() * mask[..., None])
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(model.logits(model.params, batch))
        tokens = np.asarray(model.generate(model.params, batch, max_new_tokens=10, stop_ids=(END,)))
    difference = np.abs(logits - expected.numpy())[mask].max()
    assert difference <= 2e-5 * expected.abs().max(), difference
    for ours, row in zip(tokens, said.numpy(), strict=True):
        length = min(len(row), 1 + row.tolist().index(END) if END in row else len(row))  # then they write padding
        np.testing.assert_array_equal(ours[:length], row[:length])
    assert len({tuple(row) for row in tokens.tolist()}) == 3

    commands.export_model(f"idefics:{tmp_path / 'in'}", "idefics", tmp_path / "out")
    again = transformers.IdeficsForVisionText2Text.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (1, END, 0)
    text = "w5 w7 <fake_token_around_image><image><fake_token_around_image> w9"
    assert words(text)["input_ids"] == model.tokenizer.encode(text, special=True) == [5, 7, 60, 61, 60, 9]


def test_images_are_attended_as_the_processor_of_idefics_says() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 8, (40, 25), generator=generator)
    ids[ids == 7] = IMAGE
    images = int((ids == IMAGE).sum(1).max())
    ours = Convention("idefics", image=(IMAGE,), end_id=END).media_mask(ids.numpy(), np.ones((40, 25)), images)
    np.testing.assert_array_equal(ours, their_mask(ids, images).numpy().astype(bool))


@pytest.mark.parametrize("case", OPEN_FLAMINGO)
def test_open_flamingos_checkpoint_is_read_by_pytorch(case: str, tmp_path: Path) -> None:
    spec, given = arguments(case, tmp_path / "tokenizer")
    model = published.read(spec, **given).model
    write_open_flamingo(tmp_path / "checkpoint.pt", model.config, model.variables)
    written = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    original = torch.load(ORACLES / case / "checkpoint.pt", weights_only=True)
    original = original.get("model_state_dict", original)
    assert {f"module.{key}" for key in written} == set(original) or written.keys() == original.keys()
    for key, value in original.items():
        found = written[key.removeprefix("module.")]
        assert found.dtype == value.dtype and torch.equal(found, value), key

    halved = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), model.variables)
    write_open_flamingo(tmp_path / "bfloat16.pt", model.config, halved)
    for key, value in torch.load(tmp_path / "bfloat16.pt", weights_only=True).items():
        assert torch.equal(value, written[key].bfloat16()), key
    assert read_tensors(tmp_path / "bfloat16.pt").keys() == written.keys()
