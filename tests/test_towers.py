"""Towers published by themselves: outputs against the peers', what each tensor became, refusals in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ORACLES
from safetensors.numpy import load_file, save_file

from clip_jax import cli, load
from clip_jax.errors import CheckpointError, ConfigError
from clip_jax.interop import mapping, published, towers
from clip_jax.models.variants import build_text, build_vision, get_variant
from clip_jax.training import checkpoint

NFNET, BERT = ORACLES / "timm_nfnet" / "model.safetensors", ORACLES / "hf_bert"


def oracle(case: str) -> tuple[Any, Any, float]:
    inputs, expected = (np.load(ORACLES / case / f"{part}.npz") for part in ("inputs", "expected"))
    return inputs, expected, json.loads((ORACLES / case / "meta.json").read_text())["tolerance"]["value"]


def test_nfnet_is_timms() -> None:
    """Its image is neither square nor even, so paddings are lopsided and pools have halves."""
    inputs, expected, tolerance = oracle("timm_nfnet")
    model = towers.read_timm(NFNET, image_size=75, embed_dim=16)
    assert (model.report.missing, model.report.unused) == (["projection"], ["head.fc.bias", "head.fc.weight"])
    params = model.variables["params"]["vision"]
    with jax.default_matmul_precision("highest"):
        pooled, tokens = jax.jit(build_vision(model.config).apply)(
            {"params": params}, inputs["image"].transpose(0, 2, 3, 1)
        )
    grid = tokens.reshape(3, 3, 4, -1).transpose(0, 3, 1, 2)
    assert np.abs(grid - expected["features"]).max() <= tolerance * np.abs(expected["features"]).max()
    mean = expected["pooled"] @ params["projection"]
    assert np.abs(pooled - mean).max() <= tolerance * np.abs(mean).max()


def test_bert_is_transformers() -> None:
    """At padded places too; the mask is made from the ids, the mean is that of real tokens."""
    inputs, expected, tolerance = oracle("hf_bert")
    model = towers.read_bert(BERT, embed_dim=16)
    assert (model.report.missing, model.report.unused) == (["projection"], ["pooler.dense.bias", "pooler.dense.weight"])
    params = model.variables["params"]["text"]
    with jax.default_matmul_precision("highest"):
        pooled, tokens = jax.jit(build_text(model.config).apply)(
            {"params": params}, inputs["input_ids"], type_BxL=inputs["token_type_ids"]
        )
    for got, wanted in (
        (tokens, expected["last_hidden_state"]),
        (pooled, expected["mean_pool"] @ params["projection"]),
    ):
        assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


def test_padding_changes_nothing() -> None:
    """Neither its length nor its table's row; a text of padding alone is finite."""
    config = get_variant("debug-NFNet")
    model = build_text(config)
    ids = np.zeros((2, 16), np.int32)
    ids[0, :5] = [7, 8, 9, 10, 4095]
    variables: Any = jax.tree.map(jnp.asarray, mapping.initial_variables(config))["params"]["text"]
    apply = jax.jit(model.apply)
    long, _ = apply({"params": variables}, ids)
    short, _ = apply({"params": variables}, ids[:, :6])
    np.testing.assert_allclose(long[0], short[0], atol=1e-6)
    variables["token_embedding"] = variables["token_embedding"].at[0].add(100.0)
    moved, _ = apply({"params": variables}, ids)
    np.testing.assert_allclose(long[0], moved[0], atol=1e-6)
    assert np.isfinite(moved).all()
    with pytest.raises(ConfigError, match="text of 21 tokens: at most 20 positions"):
        apply({"params": variables}, np.ones((1, 21), np.int32))


def test_tensors_go_in_and_out_bit_for_bit() -> None:
    for model, layout, file in (
        (towers.read_timm(NFNET, image_size=64), towers.nfnet_layout(4), NFNET),
        (towers.read_bert(BERT), towers.BERT_LAYOUT, BERT / "model.safetensors"),
    ):
        written, original = mapping.to_theirs(layout, model.variables), load_file(file)
        assert written.pop("projection").shape[1] == 1376
        assert original.keys() - written.keys() == set(model.report.unused)
        for key, value in written.items():
            assert value.dtype == original[key].dtype and np.array_equal(value, original[key]), key


def test_berts_in_the_wild(tmp_path: Path) -> None:
    """A prefix, LayerNorms of gamma and beta, the heads of pretraining, position numbers as a constant."""
    plain = towers.read_bert(BERT)
    tensors = load_file(BERT / "model.safetensors")
    old = {
        f"bert.{key}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in tensors.items()
    }
    old |= {"bert.embeddings.position_ids": np.arange(29)[None], "cls.predictions.bias": np.zeros(97, np.float32)}
    shutil.copy(BERT / "config.json", tmp_path)
    save_file(old, tmp_path / "model.safetensors")
    wild = towers.read_bert(tmp_path)
    assert wild.report.ignored == ["embeddings.position_ids"] and "cls.predictions.bias" in wild.report.unused
    for got, expected in zip(jax.tree.leaves(wild.variables), jax.tree.leaves(plain.variables), strict=True):
        assert np.array_equal(got, expected)


@pytest.mark.slow
def test_a_run_starts_from_an_imported_tower(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`clip-jax import` writes what `config.init.vision` reads: the tower of a config of these sizes, and no other."""
    cli.main(["import", f"timm:{NFNET}", str(tmp_path / "run"), "--image-size", "64", "--embed-dim", "32"])
    assert "112 tensors used, 1 missing, 2 unused" in capsys.readouterr().out
    path = checkpoint.latest(tmp_path / "run")
    about = checkpoint.metadata(path)["model"]
    assert about["family"] == "nfnet" and about["towers"].keys() == {"vision"} and "tokenizer" not in about
    assert about["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    config = get_variant("debug-NFNet")
    config.vision.update(about["towers"]["vision"])
    shapes = jax.eval_shape(lambda: mapping.initial_variables(config))["params"]["vision"]
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
    read = checkpoint.restore(path, {"params.vision": {"vision": abstract}})["params.vision"]["vision"]
    kernel = load_file(NFNET)["stages.1.1.conv2.weight"]  # the first of the stacked ones
    assert np.array_equal(read["stage2_rest"]["conv2"]["kernel"][0], kernel.transpose(2, 3, 1, 0))
    with pytest.raises(ConfigError, match="a vision tower by itself; import it, and start a run from it"):
        load(tmp_path / "run")

    shutil.copytree(BERT, tmp_path / "bert")
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"]) + "\n")
    cli.main(["import", f"bert:{tmp_path / 'bert'}", str(tmp_path / "text"), "--embed-dim", "32"])
    about = checkpoint.metadata(checkpoint.latest(tmp_path / "text"))["model"]
    assert about["family"] == "bert" and "preprocess" not in about
    assert (tmp_path / "text" / about["tokenizer"]["file"]).is_file()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no weight says how large images are; pass image_size"):
        published.read(f"timm:{NFNET}")
    with pytest.raises(ConfigError, match="a text tower has no image_size and no preprocess"):
        published.read(f"bert:{BERT}", image_size=32)
    with pytest.raises(ConfigError, match="embed_dim is for a tower by itself"):
        published.read(f"hf:{ORACLES / 'hf_clip_gelu'}", embed_dim=32)
    with pytest.raises(ConfigError, match="a text tower by itself"):
        load(f"bert:{BERT}")

    tensors = load_file(NFNET)
    faults: list[tuple[Any, str]] = [
        (
            lambda t: t.pop("stages.0.0.skipinit_gain"),
            "no stages.0.0.skipinit_gain; expected the weights of timm's dm_",
        ),
        (lambda t: t.pop("stem.conv4.weight"), "no stem.conv4.weight of 4 dimensions"),
        (lambda t: t.pop("stages.1.1.conv2.gain"), r"1 tensors missing \(first: stages.1.1.conv2.gain\)"),
        (
            lambda t: t.update({"stages.1.7.conv1.bias": t["final_conv.bias"]}),
            r"17 tensors missing \(first: stages.1.2.skip",
        ),
        (
            lambda t: t.update({"final_conv.bias": t["final_conv.bias"][1:]}),
            r"has shape \[79\]; this model expects \[80\]",
        ),
    ]
    for change, message in faults:
        changed = dict(tensors)
        change(changed)
        save_file(changed, tmp_path / "weights.safetensors")
        with pytest.raises(CheckpointError, match=message):
            towers.read_timm(tmp_path / "weights.safetensors", image_size=64)

    directory = tmp_path / "bert"
    shutil.copytree(BERT, directory)
    values = json.loads((BERT / "config.json").read_text())
    for field, value, message in (
        ("model_type", "roberta", "model_type 'roberta'; expected bert"),
        ("hidden_act", "relu", "hidden_act is 'relu'; expected one of 'gelu'"),
        ("position_embedding_type", "relative_key", "expected position_embedding_type absolute"),
        ("pad_token_id", None, "pad_token_id is None"),
        ("num_hidden_layers", 2, r"16 tensors unused \(first: encoder.layer.2"),
    ):
        (directory / "config.json").write_text(json.dumps(values | {field: value}))
        with pytest.raises(CheckpointError, match=message):
            towers.read_bert(directory)
