"""A locked tower: from another CLIP, from imported weights; never changed, and refused where it does not fit."""

from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from conftest import ORACLES
from test_flamingo_task import digest, save
from test_load import small_tokenizer

from clip_jax import cli, sharding
from clip_jax.errors import ConfigError
from clip_jax.training import checkpoint
from clip_jax.training import state as train_state
from clip_jax.training.clip_task import ClipTask
from clip_jax.training.loop import first_state, train
from clip_jax.training.optimizer import make_optimizer
from configs.clip import lit, quickstart


def one() -> jax.sharding.Mesh:
    return sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of an untrained CLIP."""
    workdir = tmp_path_factory.mktemp("clip")
    config = quickstart.get_config("debug")
    save(ClipTask(config, one()), config, workdir, one())
    return workdir


def config_of(vision: Path) -> ml_collections.ConfigDict:
    config = lit.get_config("debug")
    config.init.vision, config.steps = str(vision), 2
    config.data.evaluate = {}
    return config


def optimized(state: train_state.TrainState) -> set[str]:
    """The top-level subtrees with optimiser state."""
    paths = [path for path, _ in jax.tree.leaves_with_path(state.opt_state)]
    keys = ([k.key for k in path if isinstance(k, jax.tree_util.DictKey)] for path in paths)
    return {found[0] for found in keys if found}


@pytest.mark.slow
def test_the_tower_of_another_clip_stays_as_it_was(clip: Path, tmp_path: Path) -> None:
    config = config_of(clip)
    state = train(config, ClipTask(config, one()), tmp_path, one())
    assert int(state.step) == 2 and set(state.frozen) == {"vision"}
    assert optimized(state) == {"text", "logit_scale"}
    assert digest(state.frozen["vision"]) == digest(checkpoint.load(clip, "params/vision"))
    # What BatchNorm has seen, too: a tower that went on counting would not be locked.
    assert digest(state.model_state) == digest(checkpoint.load(clip, "state"))
    assert digest(state.trainable["text"]) != digest(checkpoint.load(clip, "params/text"))
    step = checkpoint.latest(tmp_path)
    assert not (step / "params.vision").exists() and (step.parent / checkpoint.FROZEN / "params.vision").is_dir()
    assert digest(checkpoint.load(tmp_path, "params/vision")) == digest(state.frozen["vision"])


def imported(tmp_path: Path) -> ml_collections.ConfigDict:
    """A config for the tower of the oracle's published weights."""
    where = tmp_path / "imported"
    cli.main(["import", f"open_clip:{ORACLES / 'openai_clip_vit'}", str(where),
              "--tokenizer", str(small_tokenizer(tmp_path))])  # fmt: skip
    config = config_of(where)
    sizes = dict(kind="vit", image_size=35, patch_size=7, width=40, layers=3, heads=5, remat="none", patch_dropout=0.0)
    config.model.vision = ml_collections.ConfigDict(sizes)
    config.model.embed_dim = 28
    config.data.mean, config.data.std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return config


@pytest.mark.slow
def test_an_imported_tower_gives_its_peer_s_features(tmp_path: Path) -> None:
    config = imported(tmp_path)
    task: Any = ClipTask(config, one())
    optimizer = make_optimizer(config.optimizer, config.steps)
    with sharding.use_mesh(one()):
        create = train_state.create_fn(task, optimizer, config.frozen)
        abstract, shardings = train_state.abstract_state(create, one(), sharding.DEFAULT_RULES)
        state = first_state(task, create, abstract, shardings, 0)
    assert optimized(state) == {"text", "logit_scale"}
    inputs, expected = (np.load(ORACLES / "openai_clip_vit" / f"{name}.npz") for name in ("inputs", "expected"))
    image = inputs["image"].transpose(0, 2, 3, 1)
    with jax.default_matmul_precision("highest"):
        pooled, _ = task.model.vision.apply({"params": state.frozen["vision"]}, image)
    want = expected["image_features"]
    assert np.abs(np.asarray(pooled) - want).max() <= 1e-5 * np.abs(want).max()

    for key, value, message in [
        ("model.activation", "gelu", "activation is 'quick_gelu' in the checkpoint; this config expects 'gelu'"),
        ("model.vision.heads", 4, "init.vision: heads is 5 in the checkpoint; this config expects 4"),
        ("data.mean", (0.5, 0.5, 0.5), "init.vision: mean is (0.48145466, 0.4578275, 0.40821073) in the checkpoint"),
        ("init.text", str(tmp_path / "imported"), "init.text: context_length is 13 in the checkpoint"),
    ]:
        other = config.copy_and_resolve_references()
        *path, last = key.split(".")
        node = other
        for name in path:
            node = node[name]
        node[last] = value
        with pytest.raises(ConfigError) as error:
            ClipTask(other, one()).sources()
        assert message in str(error.value)


def test_what_is_no_tower_is_refused(clip: Path) -> None:
    config = config_of(clip)
    config.model.vision.width = 16
    with pytest.raises(ConfigError, match="init.vision: width is 8 in the checkpoint; this config expects 16"):
        ClipTask(config, one()).sources()
    config.init.vision = ""
    with pytest.raises(ConfigError, match="init.vision is empty, and the tower is frozen: name what it is taken from"):
        ClipTask(config, one()).sources()
    named = lit.get_config("ViT-B/32")
    assert (named.frozen, named.init.vision, named.model.vision.width) == (("vision/",), "", 768)
