"""Models by name, as checkpoints of ours, and the commands that turn the one into the other."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import ORACLES
from PIL import Image
from safetensors.numpy import save_file

import clip_jax
from clip_jax import cli
from clip_jax.data.sources import ASSETS
from clip_jax.errors import CheckpointError, ConfigError
from clip_jax.interop import huggingface, imported, mapping, open_clip
from clip_jax.interop.tensors import read_tensors
from clip_jax.sharding import make_mesh
from clip_jax.training import checkpoint

EMOJI_TOKENIZER = str(ASSETS / "emoji" / "tokenizer.json")


def config_of(vocab_size: int) -> dict[str, Any]:
    vision = dict(kind="vit", image_size=16, patch_size=8, width=64, layers=2, heads=1)
    text = dict(vocab_size=vocab_size, context_length=77, width=64, layers=1, heads=1, end_id=None)
    return imported.model_config(vision, text, 16, "quick_gelu")


def written(path: Path, kind: str) -> str:
    """A model of the kind's format, and its name; of the size of OpenAI's vocabulary."""
    config = config_of(49408)
    variables = mapping.initial_variables(config)
    fields = dict(image_size=16, **imported.PREPROCESS["clip"])
    if kind == "hf":
        huggingface.write_directory(path, config, variables, fields)
        return f"hf:{path}"
    open_clip.write_open_clip(path, config, variables, fields)
    file = path / "open_clip_model.safetensors"
    return {
        "openai": f"openai:{file}",
        "open_clip": f"open_clip:{path}",
        "open_clip with config": f"open_clip:{file},{path}/open_clip_config.json",
    }[kind]


def test_the_same_weights_by_every_name_give_the_same_embeddings(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8))
    found = []
    for kind in ("hf", "openai", "open_clip", "open_clip with config"):
        model = clip_jax.load(written(tmp_path / kind.replace(" ", "_"), kind))
        pixels, ids = model.preprocess(picture)[None], model.tokenizer(["a cat"])
        assert pixels.shape == (1, 16, 16, 3) and ids.shape == (1, 77) and ids.max() == 49407
        found.append((model.encode_image(model.params, pixels), model.encode_text(model.params, ids)))
        assert model.metadata["model"]["activation"] == "quick_gelu"
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_published_weights_are_sharded_over_a_mesh(tmp_path: Path) -> None:
    spec = written(tmp_path / "hf", "hf")
    whole, sharded = clip_jax.load(spec).params, clip_jax.load(spec, mesh=make_mesh({"fsdp": 4, "tensor": 2})).params
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, sharded))
    table = sharded["params"]["text"]["token_embedding"]
    assert table.sharding.shard_shape(table.shape) == (49408 // 2, 64 // 4)


def run(*words: object) -> None:
    cli.main([str(word) for word in words])


def test_import_info_and_export_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In as a checkpoint, from which towers can be started, and out again: the same bits."""
    run("import", f"open_clip:{ORACLES / 'openai_clip_rn'}", tmp_path / "run", "--tokenizer", small_tokenizer(tmp_path))
    told = capsys.readouterr().out
    assert "149 tensors used, 0 missing, 0 unused, 22 constants ignored" in told  # 22 BatchNorms
    assert f"wrote {tmp_path}/run/checkpoints/00000000" in told
    original = read_tensors(ORACLES / "openai_clip_rn")
    pool = checkpoint.load(tmp_path / "run", "params/vision")["pool"]["position_embedding"]
    assert np.array_equal(pool, original["visual.attnpool.positional_embedding"])

    (tmp_path / "run").rename(tmp_path / "moved")
    run("info", tmp_path / "moved", "--json")
    info = json.loads(capsys.readouterr().out)
    assert info["parameters"]["all"] == sum(
        v.size for k, v in original.items() if "running" not in k and "num_" not in k
    )
    assert (info["family"], info["activation"], info["source"]) == ("clip", "gelu", "open_clip:openai_clip_rn")
    assert info["tokenizer"] == "tokenizer/tokenizer.json"
    run("info", tmp_path / "moved")
    assert "activation  gelu\n" in capsys.readouterr().out

    run("export", tmp_path / "moved", tmp_path / "out", "--format", "open_clip")
    again = read_tensors(tmp_path / "out")
    assert all(np.array_equal(value, original[key]) for key, value in again.items())
    assert len(again) == len(original) - 22 == 149


def small_tokenizer(directory: Path) -> Path:
    """A tokenizer.json of as many ids as the oracles' text towers have at most."""
    vocab = {"<|pad|>": 0, "a": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    special = [
        dict(id=i, content=token, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for token, i in vocab.items()
        if i != 1
    ]
    values = dict(
        version="1.0", truncation=None, padding=None, added_tokens=special, normalizer=None, pre_tokenizer=None,
        post_processor=None, decoder=None, model=dict(type="BPE", vocab=vocab, merges=[]),
    )  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(values))
    return directory / "tokenizer.json"


def test_what_the_weights_do_not_say_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hf_clip_gelu: no tokenizer there .*; name one: tokenizer=PATH"):
        clip_jax.load(f"hf:{ORACLES / 'hf_clip_gelu'}", preprocess="clip")
    with pytest.raises(ConfigError, match="has 4096 ids; this model has 99"):
        clip_jax.load(f"hf:{ORACLES / 'hf_clip_gelu'}", preprocess="clip", tokenizer=EMOJI_TOKENIZER)
    with pytest.raises(ConfigError, match="pass preprocess=clip or siglip"):
        clip_jax.load(f"hf:{ORACLES / 'hf_siglip'}")
    with pytest.raises(CheckpointError, match="config.json: not readable JSON"):
        clip_jax.load(f"hf:{tmp_path}")
    with pytest.raises(ConfigError, match="are for published weights only"):
        clip_jax.load(tmp_path, image_size=32)
    with pytest.raises(CheckpointError, match="no finished checkpoint there"):
        clip_jax.load(tmp_path)
    save_file({"x": np.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a state dict of OpenAI's CLIP"):
        clip_jax.load(f"openai:{tmp_path / 'x.safetensors'}")


def test_commands_say_in_one_line_what_is_wrong(tmp_path: Path) -> None:
    for words, message in [
        (("import", tmp_path, tmp_path / "x"), "expected one of hf:PATH, openai:PATH, open_clip:PATH"),
        (("import", f"hf:{tmp_path}", tmp_path / "x"), "config.json: not readable JSON"),
        (("export", tmp_path, tmp_path / "x", "--format", "hf"), "no finished checkpoint there"),
    ]:
        with pytest.raises(SystemExit, match="error: .*") as stop:
            run(*words)
        assert message in str(stop.value) and "\n" not in str(stop.value)
    assert not list(tmp_path.iterdir())


def test_an_import_starts_training_towers(tmp_path: Path) -> None:
    """`init` names the imported workdir; the restored leaves are those of the file, on the given sharding."""
    spec = written(tmp_path / "weights", "open_clip")
    run("import", spec, tmp_path / "run")
    tower = checkpoint.load(tmp_path / "run", "params/text")
    original = read_tensors(tmp_path / "weights")
    assert np.array_equal(tower["projection"], original["text_projection"])
    assert isinstance(tower["projection"], jax.Array) and tower["projection"].dtype == np.float32
    model = clip_jax.load(tmp_path / "run")
    assert model.tokenizer(["a cat"]).max() == 49407
    with pytest.raises(SystemExit, match="not empty; name a new directory"):
        run("import", spec, tmp_path / "run")
