"""Published layouts in and out: outputs against the peers', exports bit for bit, refusals in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ORACLES
from PIL import Image
from safetensors.numpy import save_file

from clip_jax.errors import CheckpointError, ConfigError, UserError
from clip_jax.interop import huggingface, mapping, open_clip
from clip_jax.interop.imported import Imported
from clip_jax.interop.tensors import read_tensors
from clip_jax.models.variants import build_two_tower

HF_CASES = ("hf_clip_quickgelu", "hf_clip_gelu", "hf_siglip")
OPEN_CLIP_CASES = ("openai_clip_vit", "openai_clip_rn")


def imported(case: str, **arguments: Any) -> Imported:
    if case in HF_CASES:
        return huggingface.read_directory(ORACLES / case, **{"preprocess": "clip"} | arguments)
    return open_clip.read_open_clip(ORACLES / case, **arguments)


def embed(model: Imported, image: np.ndarray, text: np.ndarray) -> tuple[Any, Any, dict[str, Any]]:
    with jax.default_matmul_precision("highest"):
        batch = {"image": image.transpose(0, 2, 3, 1), "text": text}
        return jax.jit(build_two_tower(model.config).apply)(model.variables, batch)


@pytest.mark.parametrize("case", HF_CASES + OPEN_CLIP_CASES)
def test_outputs_are_the_peers(case: str) -> None:
    inputs, expected = (np.load(ORACLES / case / f"{part}.npz") for part in ("inputs", "expected"))
    tolerance = json.loads((ORACLES / case / "meta.json").read_text())["tolerance"]["value"]
    model = imported(case)
    theirs = case in HF_CASES
    image, text, extras = embed(
        model, inputs["pixel_values" if theirs else "image"], inputs["input_ids" if theirs else "text"]
    )

    def check(got: Any, key: str) -> None:
        assert np.abs(got - expected[key]).max() <= tolerance * np.abs(expected[key]).max(), key

    check(image, "image_embeds" if theirs else "image_features_normalized")
    check(text, "text_embeds" if theirs else "text_features_normalized")
    check(extras["logit_scale"] * image @ text.T + extras.get("logit_bias", 0.0), "logits_per_image")
    if "patch_tokens" in expected:
        check(extras["image_tokens"][:, 1:], "patch_tokens")
    if "feature_map" in expected:  # row by row
        check(extras["image_tokens"].reshape(4, 3, 3, -1).transpose(0, 3, 1, 2), "feature_map")


@pytest.mark.parametrize("case", HF_CASES + OPEN_CLIP_CASES)
def test_exports_hold_the_same_bits(case: str, tmp_path: Path) -> None:
    model = imported(case)
    write = huggingface.write_directory if case in HF_CASES else open_clip.write_open_clip
    write(tmp_path / "out", model.config, model.variables, model.preprocess)
    original, written = read_tensors(ORACLES / case), read_tensors(tmp_path / "out")
    constants = {key for key in original if key.endswith("num_batches_tracked")}
    assert original.keys() - constants == written.keys()
    assert set(model.report.ignored) == constants
    for key, value in written.items():
        assert value.dtype == original[key].dtype and np.array_equal(value, original[key]), key
    read = huggingface.read_directory if case in HF_CASES else open_clip.read_open_clip
    again = read(tmp_path / "out")
    assert (again.config, again.preprocess) == (model.config, model.preprocess)
    assert not (tmp_path / "out.tmp").exists()
    with pytest.raises(ConfigError, match="out: exists already"):
        write(tmp_path / "out", model.config, model.variables, model.preprocess)


def test_openais_own_weights_need_no_config(tmp_path: Path) -> None:
    """Half precision, sizes from shapes, constants beside the weights."""
    vision = dict(kind="vit", image_size=24, patch_size=8, width=64, layers=2, heads=1)
    text = dict(vocab_size=40, context_length=9, width=128, layers=3, heads=2, end_id=None)
    rng = np.random.default_rng(0)
    for number, tower in enumerate((vision, dict(kind="resnet", image_size=64, width=4, layers=(1, 2, 1, 1), heads=2))):
        config = open_clip.model_config(dict(tower), text, 32, "quick_gelu")
        rows = open_clip.layout(config)
        variables: Any = jax.tree.map(
            lambda x: np.asarray(rng.normal(size=x.shape), np.float16), mapping.initial_variables(config)
        )
        tensors = mapping.to_theirs(rows, variables)
        constants = {key: np.array(7) for key in ("input_resolution", "context_length", "vocab_size")}
        save_file(tensors | constants, tmp_path / f"{number}.safetensors")
        got = open_clip.read_openai(tmp_path / f"{number}.safetensors")
        assert got.config == config
        assert got.preprocess["image_size"] == tower["image_size"]
        assert sorted(got.report.ignored) == sorted(constants) and not got.report.unused
        for (path, value), original in zip(
            jax.tree_util.tree_leaves_with_path(got.variables), jax.tree.leaves(variables), strict=True
        ):
            assert value.dtype == np.float32 and np.array_equal(value, original), path


def copied(case: str, directory: Path, **changes: Any) -> Path:
    """A case's directory whose config has other fields; "vision_config.image_size" changes one inside."""
    shutil.copytree(ORACLES / case, directory)
    file = directory / ("config.json" if case in HF_CASES else "open_clip_config.json")
    config = json.loads(file.read_text())
    for key, value in changes.items():
        *parents, last = key.split(".")
        where = config
        for parent in parents:
            where = where[parent]
        where[last] = value
    file.write_text(json.dumps(config))
    return directory


def changed(case: str, directory: Path, change: Any) -> Path:
    """A case's directory whose tensors `change` has edited."""
    shutil.copytree(ORACLES / case, directory)
    file = next(directory.glob("*.safetensors"))
    tensors = read_tensors(file)
    change(tensors)
    save_file(tensors, file)
    return directory


def test_missing_unused_and_wrong_tensors_are_named(tmp_path: Path) -> None:
    key = "visual.ln_pre.bias"

    def rename(tensors: dict[str, np.ndarray]) -> None:
        tensors["visual.ln_pr.bias"] = tensors.pop(key)

    directory = changed("openai_clip_vit", tmp_path / "a", rename)
    with pytest.raises(
        CheckpointError, match=rf"1 tensors missing \(first: {key}\), 1 tensors unused \(first: visual.ln_pr.bias\)"
    ):
        open_clip.read_open_clip(directory)
    with pytest.raises(CheckpointError, match=r"a: 1 tensors unused"):
        open_clip.read_open_clip(directory, allow=[r"visual\.ln_pre"])
    got = open_clip.read_open_clip(directory, allow=[r"visual\.ln_pre?\."])
    assert (got.report.missing, got.report.unused) == ([key], ["visual.ln_pr.bias"])
    assert np.array_equal(got.variables["params"]["vision"]["ln_pre"]["bias"], np.zeros(40))  # initialised

    layer = "transformer.resblocks.1.attn.in_proj_weight"
    faults: list[tuple[Any, str]] = [
        (lambda t: t.update({layer: t[layer][:, :-1].copy()}), rf"{layer} has shape \[108, 35\].* \[108, 36\]"),
        (lambda t: t.update({layer: t[layer].astype(np.int8)}), f"{layer} is int8; floats expected"),
        (lambda t: t.update({layer: t[layer] * np.float32(np.inf)}), f"{layer} holds (infinities|values that are no)"),
        (lambda t: t.pop(layer), rf"1 tensors missing \(first: {layer}\)"),
    ]
    for i, (change, message) in enumerate(faults):
        with pytest.raises(CheckpointError, match=message):
            open_clip.read_open_clip(changed("openai_clip_vit", tmp_path / str(i), change))


REFUSED = [
    ("hf_clip_gelu", {"model_type": "blip"}, "config.json: model_type 'blip'; expected one of clip, siglip"),
    ("hf_clip_gelu", {"text_config.hidden_act": "relu"}, "config.json: text_config: hidden_act is 'relu'"),
    ("hf_clip_gelu", {"text_config.hidden_act": "quick_gelu"}, "towers of two activations"),
    (
        "hf_clip_gelu",
        {"vision_config.hidden_size": "wide"},
        "vision_config: hidden_size is 'wide'; a whole number from 1",
    ),
    ("hf_clip_gelu", {"text_config.num_hidden_layers": 10**9}, "is 1000000000; a whole number from 1 to 1000 expec"),
    ("hf_clip_gelu", {"vision_config": [1]}, "vision_config: an object expected, not a list"),
    ("hf_siglip", {"vision_config.vision_use_head": False}, "vision_use_head is false"),
    ("openai_clip_vit", {"model_cfg.vision_cfg.timm_model_name": "x"}, "vision_cfg: timm_model_name 'x' is not supp"),
    ("openai_clip_vit", {"model_cfg.vision_cfg.no_ln_pre": True}, "vision_cfg: no_ln_pre True is not supported"),
    ("openai_clip_vit", {"model_cfg.text_cfg.pool_type": "first"}, "text_cfg: pool_type is 'first'; expected one of"),
    ("openai_clip_vit", {"model_cfg.multimodal_cfg": {}}, "open_clip_config.json: multimodal_cfg {} is not supported"),
    ("openai_clip_vit", {"preprocess_cfg.resize_mode": "longest"}, "preprocess_cfg: resize_mode is 'longest'"),
]


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED)
def test_what_has_no_counterpart_is_refused(case: str, changes: dict, message: str, tmp_path: Path) -> None:
    directory = copied(case, tmp_path / "model", **changes)
    with pytest.raises(UserError, match=message):
        if case in HF_CASES:
            huggingface.read_directory(directory, preprocess="clip")
        else:
            open_clip.read_open_clip(directory)


def test_preprocessing_is_read_or_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing there says how images are prepared; pass preprocess=clip or siglip"):
        huggingface.read_directory(ORACLES / "hf_clip_gelu")
    with pytest.raises(ConfigError, match="preprocess 'laion': expected one of clip, siglip, imagenet"):
        huggingface.read_directory(ORACLES / "hf_clip_gelu", preprocess="laion")
    directory = copied("hf_clip_gelu", tmp_path / "model")
    written: dict[str, Any] = dict(size=35, crop_size={"height": 35, "width": 35}, do_center_crop=True, resample=2,
                   image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])  # fmt: skip
    file = directory / "preprocessor_config.json"
    file.write_text(json.dumps(written))
    assert huggingface.read_directory(directory).preprocess == dict(
        image_size=35, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], interpolation="bilinear",
        resize_mode="shorter side, centre crop",
    )  # fmt: skip
    changes: list[tuple[dict[str, Any], str]] = [
        ({"resample": 5}, "resample is 5; expected one of 2, 3"),
        ({"crop_size": 30}, "size 35 and crop_size 30; two equal sizes expected"),
        ({"do_normalize": False}, "do_normalize is False; only true is supported"),
        ({"image_std": None}, "image_std is None; three numbers expected"),
    ]
    for change, message in changes:
        file.write_text(json.dumps(written | change))
        with pytest.raises(CheckpointError, match=message):
            huggingface.read_directory(directory)


def test_the_end_of_the_text_is_the_configs(tmp_path: Path) -> None:
    assert imported("hf_clip_quickgelu").config["text"]["end_id"] is None
    assert imported("hf_clip_gelu").config["text"]["end_id"] == 41
    old = copied("hf_clip_gelu", tmp_path / "model", text_config_dict={"eos_token_id": 40})
    assert huggingface.read_directory(old, preprocess="clip").config["text"]["end_id"] == 40


def test_positions_are_resized_as_an_antialiased_bicubic_image() -> None:
    """Pillow's bicubic filter is the same one (a = -0.5, widened when it shrinks)."""
    table = np.random.default_rng(0).normal(size=(1 + 49, 3)).astype(np.float32)
    for grid in (5, 12):
        got = mapping.resize_positions(table, grid, 1)
        assert np.array_equal(got[0], table[0]) and got.shape == (1 + grid**2, 3)
        for channel in range(3):
            image = Image.fromarray(table[1:, channel].reshape(7, 7), "F")
            expected = np.asarray(image.resize((grid, grid), Image.Resampling.BICUBIC)).ravel()
            np.testing.assert_allclose(got[1:, channel], expected, atol=2e-6)


@pytest.mark.parametrize("case", ["hf_siglip", "openai_clip_vit"])
def test_another_resolution(case: str) -> None:
    model = imported(case, image_size=56)
    assert model.preprocess["image_size"] == model.config["vision"]["image_size"] == 56
    image, text = np.zeros((1, 3, 56, 56), np.float32), np.ones((1, 11), np.int32)
    assert np.isfinite(embed(model, image, text)[0]).all()


def test_formats_without_words_for_a_model_say_so(tmp_path: Path) -> None:
    resnet, siglip = imported("openai_clip_rn"), imported("hf_siglip")
    with pytest.raises(ConfigError, match="a vision tower of kind resnet: transformers' CLIP has vit only"):
        huggingface.write_directory(tmp_path / "x", resnet.config, resnet.variables, resnet.preprocess)
    with pytest.raises(ConfigError, match="a vision tower of pool map: open_clip has it from timm only"):
        open_clip.write_open_clip(tmp_path / "x", siglip.config, siglip.variables, siglip.preprocess)
    vit = imported("openai_clip_vit")
    vit.variables["params"]["extra"] = np.zeros(1)
    with pytest.raises(CheckpointError, match="this layout has no place for params/extra"):
        huggingface.write_directory(tmp_path / "x", vit.config, vit.variables, vit.preprocess)
    assert not list(tmp_path.iterdir())
