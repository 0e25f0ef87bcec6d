"""OpenFlamingo's and IDEFICS's checkpoints: their logits, and one clear line for what is wrong."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ORACLES
from safetensors.numpy import save_file

from clip_jax.errors import CheckpointError
from clip_jax.interop.tensors import Tensors, read_tensors
from flamingo_jax.decoding import generate
from flamingo_jax.interop import idefics
from flamingo_jax.interop.idefics import read_idefics
from flamingo_jax.interop.open_flamingo import ImportedFlamingo, read_open_flamingo
from flamingo_jax.models.variants import build_flamingo

IDEFICS = ("hf_idefics_float", "hf_idefics_vector")
Batch = dict[str, np.ndarray]


def load(case: str) -> tuple[Any, Any, dict[str, Any]]:
    """(inputs, expected, meta.json)."""
    inputs, expected = (np.load(ORACLES / case / f"{part}.npz") for part in ("inputs", "expected"))
    return inputs, expected, json.loads((ORACLES / case / "meta.json").read_text())


def open_flamingo(case: str, checkpoint: Path | None = None, **arguments: Any) -> ImportedFlamingo:
    where = ORACLES / case
    arguments = {"preprocess": "clip"} | arguments
    return read_open_flamingo(
        checkpoint or where / "checkpoint.pt", f"open_clip:{where / 'vision'}", where / "lm", **arguments
    )


def logits(model: ImportedFlamingo, batch: Batch) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(build_flamingo(model.config).apply)(model.variables, batch))


def assert_close(got: np.ndarray, expected: np.ndarray, mask: np.ndarray, tolerance: float) -> None:
    got = got[..., : expected.shape[-1]] * mask[..., None]
    assert np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("case", ["of_llama", "of_opt"])
def test_logits_are_open_flamingos(case: str) -> None:
    """A language model with a head of its own, whose vocabulary grew; and a tied one whose vocabulary shrank."""
    inputs, expected, meta = load(case)
    batch = open_flamingo_batch(inputs, meta)
    mask = batch["text_mask"]
    for key, norm_tokens in (("logits", False), ("logits_post_ln", True)):
        model = open_flamingo(case, norm_tokens=norm_tokens)
        assert model.config["interval"] == meta["config"]["cross_attn_every_n_layers"]
        assert model.config["language_model"]["vocab_size"] == meta["config"]["eoc_token_id"]
        assert_close(logits(model, batch), expected[key], mask, meta["tolerance"]["value"])
    stored = read_tensors(ORACLES / case / "checkpoint.pt")
    assert set(model.report.used) == {key.removeprefix("module.") for key in stored}


def open_flamingo_batch(inputs: Any, meta: dict[str, Any]) -> Batch:
    text = inputs["lang_x"]
    latest = np.cumsum(text == meta["config"]["media_token_id"], axis=1)
    return dict(
        media=inputs["vision_x"].transpose(0, 1, 2, 4, 5, 3), frame_mask=np.ones((4, 2, 1), bool), text=text,
        text_mask=inputs["attention_mask"].astype(bool), media_mask=latest[..., None] == np.arange(1, 3),
    )  # fmt: skip


def test_generation_keeps_the_blocks_before_the_first_gated_one() -> None:
    """OpenFlamingo's first block has no gated one before it; its keys and values are cached like the others'."""
    inputs, _, meta = load("of_llama")
    model, new = open_flamingo("of_llama"), 4
    assert model.config["first_block"] == 1
    batch = {key: value[[0, 1, 3]] for key, value in open_flamingo_batch(inputs, meta).items()}  # padded on the left
    with jax.default_matmul_precision("highest"):
        said = np.asarray(generate(build_flamingo(model.config), model.variables, batch, max_new_tokens=new).tokens)
    grown = batch | {
        "text": np.concatenate([batch["text"], said], axis=1),
        "text_mask": np.pad(batch["text_mask"], ((0, 0), (0, new)), constant_values=True),
        "media_mask": np.concatenate([batch["media_mask"], np.repeat(batch["media_mask"][:, -1:], new, 1)], axis=1),
    }
    np.testing.assert_array_equal(logits(model, grown)[:, -new - 1 : -1].argmax(axis=-1), said)


def test_blocks_without_gates_are_those_with_open_ones() -> None:
    inputs, _, _ = load("hf_idefics_float")
    model, batch = read_idefics(ORACLES / "hf_idefics_float"), idefics_batch(inputs)
    gated = model.variables["params"]["gated"]
    for name in ("attention_gate", "mlp_gate"):
        gated[name] = np.full_like(gated[name], 20.0)  # tanh(20) is 1 in float32
    opened = logits(model, batch)
    for name in ("attention_gate", "mlp_gate"):
        del gated[name]
    model.config["gated"]["gate"] = "none"
    np.testing.assert_allclose(logits(model, batch), opened, rtol=1e-5, atol=1e-5)


def idefics_batch(inputs: Any) -> Batch:
    return dict(
        media=inputs["pixel_values"].transpose(0, 1, 3, 4, 2)[:, :, None], frame_mask=np.ones((3, 3, 1), bool),
        text=inputs["input_ids"], text_mask=inputs["attention_mask"].astype(bool),
        media_mask=inputs["image_attention_mask"].astype(bool),
    )  # fmt: skip


@pytest.mark.parametrize("case", IDEFICS)
def test_logits_and_generated_tokens_are_idefics(case: str) -> None:
    inputs, expected, meta = load(case)
    model, batch = read_idefics(ORACLES / case), idefics_batch(inputs)
    assert_close(logits(model, batch), expected["logits"], batch["text_mask"], meta["tolerance"]["value"])
    assert set(model.report.used) == set(read_tensors(ORACLES / case))
    legacy = json.loads((ORACLES / case / "config_legacy.json").read_text())
    assert idefics.model_fields(legacy, "") == model.config
    with jax.default_matmul_precision("highest"):
        said = generate(build_flamingo(model.config), model.variables, batch, max_new_tokens=8)
    np.testing.assert_array_equal(said.tokens, expected["generated"])


@pytest.fixture
def tensors() -> Tensors:
    return read_tensors(ORACLES / "of_opt" / "checkpoint.pt")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"perceiver.norm.bias": None}, r"1 tensors missing \(first: perceiver\.norm\.bias\)"),
        ({"lang_encoder.score.weight": np.ones(3, np.float32)}, r"1 tensors unused \(first: lang_encoder\.score"),
        ({"perceiver.norm.bias": np.ones(3, np.float32)}, r"perceiver\.norm\.bias has shape \[3\]; this .* \[18\]"),
        ({"perceiver.latents": None}, r"no perceiver\.latents of two dimensions"),
        ({"lang_encoder.model.decoder.embed_tokens.weight": None}, "no lang_encoder.* is it a checkpoint for a opt"),
        ({"lang_encoder.lm_head.weight": np.ones((97, 36), np.float32)}, "differs from .*, to which it is tied"),
        ({"layers.1.gated": None}, r"gated blocks before blocks \[0, 2\] of 3; expected n-1, 2n-1"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(
    tmp_path: Path, tensors: Tensors, changed: dict[str, Any], message: str
) -> None:
    for name, value in changed.items():
        if value is None:
            tensors = {key: tensor for key, tensor in tensors.items() if name not in key}
        else:
            tensors[name] = value
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_flamingo("of_opt", tmp_path / "checkpoint.safetensors")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; expected one of 'idefics'"),
        ({"use_resampler": False}, "use_resampler is False; only True is supported"),
        ({"alpha_type": "matrix"}, "alpha_type is 'matrix'; expected one of 'float', 'vector'"),
        ({"vision_config": {"hidden_act": "selu"}}, "vision_config: hidden_act is 'selu'; expected one of"),
        ({"additional_vocab_size": None}, "additional_vocab_size is None; a whole number"),
    ],
)
def test_a_config_of_idefics_that_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    config = json.loads((ORACLES / "hf_idefics_float" / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        idefics.model_fields(config | changed, "config.json")
