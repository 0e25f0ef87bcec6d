"""The road from CLIP into Flamingo, what training may not touch, and runs that are killed."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest
from test_training import MESH_OF_8, kill_after, rows, train

from clip_jax import sharding
from clip_jax.data.sources import ASSETS as CLIP_ASSETS
from clip_jax.errors import ConfigError, DataError
from clip_jax.training import checkpoint
from clip_jax.training import state as train_state
from clip_jax.training.clip_task import ClipTask
from clip_jax.training.loop import first_state
from clip_jax.training.optimizer import make_optimizer
from clip_jax.training.starting_points import compare
from configs.clip import quickstart as clip_config
from configs.flamingo import quickstart as flamingo_config
from configs.flamingo import quickstart_lm, smollm2
from flamingo_jax.data.tokenizer import ASSETS
from flamingo_jax.training.flamingo_task import FlamingoTask
from flamingo_jax.training.language_model_task import LanguageModelTask

ONE = {"replica": 1, "fsdp": 1, "tensor": 1}
MESHES = [ONE, {"replica": 2, "fsdp": 2, "tensor": 2}, {"replica": 1, "fsdp": 8, "tensor": 1}]


def mesh_of(shape: Mapping[str, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])


def digest(tree: Any) -> str:
    h = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        h.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
    return h.hexdigest()


def save(task: Any, config: ml_collections.ConfigDict, workdir: Path, mesh: jax.sharding.Mesh) -> Any:
    """The checkpoint of an untrained run, its parameters off their initial values."""
    with sharding.use_mesh(mesh):
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = jax.jit(lambda key: sharding.unbox(train_state.create_fn(task, optimizer, ())(key)))(jax.random.key(3))
    checkpointer = checkpoint.Checkpointer(workdir / "checkpoints", 1)
    checkpointer.save(state, 1, {"model": task.metadata(), "step": 1, "config": {}})
    checkpointer.wait()
    return state


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an untrained CLIP and an untrained language model."""
    directory = tmp_path_factory.mktemp("runs")
    mesh = mesh_of(ONE)
    for name, config, task in (
        ("clip", clip_config.get_config("debug"), ClipTask),
        ("language_model", quickstart_lm.get_config("debug"), LanguageModelTask),
    ):
        save(task(config, mesh), config, directory / name, mesh)
    return directory


def config_of(runs: Path) -> ml_collections.ConfigDict:
    config = flamingo_config.get_config("debug")
    config.init.vision, config.init.language_model = str(runs / "clip"), str(runs / "language_model")
    return config


def start(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> tuple[FlamingoTask, Any]:
    """(task, state of step 0) as the trainer makes them."""
    task = FlamingoTask(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.steps)
    with sharding.use_mesh(mesh):
        create = train_state.create_fn(task, optimizer, config.frozen)
        abstract, shardings = train_state.abstract_state(create, mesh, sharding.DEFAULT_RULES)
        return task, first_state(task, create, abstract, shardings, config.seed)


def shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_tower_arrives_unchanged_on_any_mesh(runs: Path, shape: Mapping[str, int]) -> None:
    mesh, config = mesh_of(shape), config_of(runs)
    task, state = start(config, mesh)
    for name in ("vision", "language_model"):
        source = runs / ("clip" if name == "vision" else name)
        assert digest(state.frozen[name]) == digest(checkpoint.load(source, f"params/{name}"))
    assert set(state.frozen) == {"vision", "language_model"} and not set(state.trainable) & set(state.frozen)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    assert names and not any("vision" in name or "language_model" in name for name in names)

    # Its features are CLIP's: the same bits on the same mesh, and to 1e-6 on another.
    clip_run = clip_config.get_config("debug")
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
    clip, features = ClipTask(clip_run, mesh), {}
    placed = jax.device_put(images, sharding.batch_sharding(mesh))
    with sharding.use_mesh(mesh), jax.default_matmul_precision("highest"):
        params, statistics = clip.abstract_variables()
        own = {
            "params": checkpoint.load(runs / "clip", "params/vision", shardings(params["vision"])),
            "batch_stats": checkpoint.load(
                runs / "clip", "state/batch_stats/vision", shardings(statistics["batch_stats"]["vision"])
            ),
        }
        moved = {"params": state.frozen["vision"], "batch_stats": state.model_state["batch_stats"]["vision"]}
        for name, module, variables in (("clip", clip.model.vision, own), ("flamingo", task.model.vision, moved)):
            features[name] = np.asarray(jax.jit(lambda v, x, m=module: m.apply(v, x)[1])(variables, placed))
    np.testing.assert_array_equal(features["flamingo"], features["clip"])
    single = jax.jit(lambda v, x: task.model.vision.apply(v, x)[1])(jax.tree.map(np.asarray, moved), images)
    assert np.abs(features["flamingo"] - np.asarray(single)).max() <= 1e-6 * np.abs(features["clip"]).max()


def test_nothing_but_the_tower_is_read(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clip"
    shutil.copytree(runs / "clip", copy)
    step = checkpoint.latest(copy)
    sizes = {
        item: sum(f.stat().st_size for f in (step / item).rglob("*") if f.is_file())
        for item in ("params.vision", "params.text", "train")
    }
    for item in ("params.text", "train"):
        shutil.rmtree(step / item / "d")  # no byte of it is needed
    config = config_of(runs)
    config.init.vision = str(copy)
    _, state = start(config, mesh_of(ONE))
    assert digest(state.frozen["vision"]) == digest(checkpoint.load(runs / "clip", "params/vision"))
    assert sizes["params.text"] + sizes["train"] > 500_000  # there was something not to read


def test_a_resampler_may_start_from_another_flamingos(runs: Path, tmp_path: Path) -> None:
    mesh = mesh_of(ONE)
    first, second = config_of(runs), config_of(runs)
    state = save(FlamingoTask(first, mesh), first, tmp_path / "first", mesh)
    second.seed, second.init.resampler = 1, str(tmp_path / "first")
    _, moved = start(second, mesh)
    assert digest(moved.trainable["resampler"]) == digest(state.trainable["resampler"])
    assert digest(moved.trainable["gated"]) != digest(state.trainable["gated"])
    second.init.resampler = str(runs / "clip")
    with pytest.raises(ConfigError, match="a clip checkpoint, without a resampler"):
        FlamingoTask(second, mesh).sources()
    second.init.resampler, second.model.resampler.width = str(tmp_path / "first"), 16
    with pytest.raises(ConfigError, match="init.resampler: width is 32 in the checkpoint; this config expects 16"):
        FlamingoTask(second, mesh).sources()


def test_what_does_not_fit_is_said_before_anything_is_computed(runs: Path) -> None:
    mesh = mesh_of(ONE)

    def refusal(kind: type[Exception] = ConfigError, **changes: Any) -> str:
        config = config_of(runs)
        for key, value in changes.items():
            *path, last = key.split("__")
            node = config
            for part in path:
                node = node[part]
            node[last] = value
        with pytest.raises(kind) as error:
            FlamingoTask(config, mesh).sources()
        return str(error.value)

    lm = str(runs / "language_model")
    assert refusal(init__vision=lm).endswith("a language_model checkpoint, without a tower `vision`")
    assert refusal(init__language_model=str(runs / "clip")).endswith("a clip checkpoint, without a language model")
    assert "width is 8 in the checkpoint; this config expects 16" in refusal(model__vision__width=16)
    assert "activation is 'quick_gelu' in the checkpoint; this config expects 'gelu'" in refusal(
        model__activation="gelu"
    )
    assert "mean is (0.5, 0.5, 0.5) in the checkpoint; this config expects (0.4" in refusal(data__mean=(0.4, 0.4, 0.4))
    assert "layers is 3 in the checkpoint; this config expects 5" in refusal(model__language_model__layers=5)
    assert refusal(init__vision="").startswith("init.vision is empty")
    emoji = str(CLIP_ASSETS / "emoji" / "tokenizer.json")
    assert "no token <|bos|> in the vocabulary" in refusal(DataError, data__tokenizer=emoji)
    assert "has 4096 ids; the language model expects 5000" in refusal(model__language_model__vocab_size=5000)
    with pytest.raises(ConfigError, match="a: x is 1.0 in the checkpoint; this config expects 2.0"):
        compare("a", {"x": 1.0}, {"x": 2.0})
    compare("a", {"x": 9.999999747e-06}, {"x": 1e-5})


def test_another_tokenizer_of_the_same_size_is_refused(runs: Path, tmp_path: Path) -> None:
    config = config_of(runs)
    tokenizer = json.loads((ASSETS / "wordnet" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = (token for token, number in vocabulary.items() if number in (1000, 1001))
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config.data.tokenizer = str(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"init.language_model: tokenizer.sha256 is .* in the checkpoint"):
        FlamingoTask(config, mesh_of(ONE)).sources()


def test_every_config_builds_a_model_that_fits_together() -> None:
    for get_config in (flamingo_config.get_config, smollm2.get_config):
        config = get_config()
        assert config.model.language_model.width % config.model.language_model.heads == 0
        names = set(config.data.mixture)
        assert names == {"pages", "pairs", "clips"}
        assert config.data.mixture.clips.frames <= config.model.resampler.frames


FLAMINGO = "configs/flamingo/quickstart.py:debug"


def flags_of(runs: Path) -> tuple[str, ...]:
    return (
        f"--config.init.vision={runs / 'clip'}",
        f"--config.init.language_model={runs / 'language_model'}",
        "--config.steps=9",
        "--config.checkpoint_every=3",
    )


@pytest.mark.slow
def test_killed_and_resumed_the_mixtures_losses_are_the_same_bits(tmp_path: Path, runs: Path) -> None:
    devices, flags = 8, flags_of(runs) + MESH_OF_8
    whole = train(tmp_path / "whole", *flags, devices=devices, config=FLAMINGO)
    assert whole.returncode == 0, whole.stderr[-2000:]
    killed = tmp_path / "killed"
    kill_after(killed, 7, devices, *flags, config=FLAMINGO)  # by then the save of step 3 is finished
    last = train(killed, *flags, devices=devices, config=FLAMINGO)
    assert last.returncode == 0 and "resuming at step" in last.stderr, last.stderr[-2000:]
    keys = ("step", "loss", "gradient_norm", "pages/loss", "pairs/loss", "clips/loss")
    assert rows(killed, keys) == rows(tmp_path / "whole", keys) and len(rows(killed, keys)) == 9

    # Frozen parameters: what came in, saved once, named by every step.
    steps = [p for p in (killed / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(steps) == 2
    for name, source in (("vision", "clip"), ("language_model", "language_model")):
        got, came = (checkpoint.load(run, f"params/{name}") for run in (killed, runs / source))
        assert digest(got) == digest(came)
        assert not any((step / f"params.{name}").exists() for step in steps)
    assert (killed / "checkpoints" / "frozen" / "params.vision").is_dir()
