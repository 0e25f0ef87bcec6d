"""What a Flamingo learns from and what is trained of it: mixtures, frozen parts, adapters, cached features."""

import json
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from flax import traverse_util
from PIL import Image

from clip_jax import sharding
from clip_jax.data.pipeline import Stream
from clip_jax.errors import CheckpointError, ConfigError, DataError
from clip_jax.models.variants import get_variant as get_clip
from clip_jax.training import checkpoint
from clip_jax.training import state as train_state
from clip_jax.training.guard import new_guard
from clip_jax.training.loop import train
from clip_jax.training.metrics import read_metrics
from configs.flamingo import instruct
from configs.flamingo.common import stream
from flamingo_jax import adapters
from flamingo_jax.interop.open_flamingo import initial_params
from flamingo_jax.models.variants import build_language_model
from flamingo_jax.training.cached_features import prepare_features
from flamingo_jax.training.flamingo_task import FlamingoTask
from launch import prepare

ONE = {"replica": 1, "fsdp": 1, "tensor": 1}
EIGHT = {"replica": 2, "fsdp": 2, "tensor": 2}
QUERY_VALUE = ("language_model/blocks/(query|value)/",)


def mesh_of(shape: Mapping[str, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(list(shape.values())))])


def config_of(**parts: Any) -> ml_collections.ConfigDict:
    """The debug config of chats with these data sets instead, and a ViT, which compiles sooner than a ResNet."""
    config = instruct.get_config("debug")
    clip = get_clip("debug-ViT")
    config.model.vision, config.model.embed_dim = clip.vision, clip.embed_dim
    config.model.vision.norm_tokens = False
    config.model.language_model.layers = 2
    config.frozen_dtype, config.adapters.patterns = "float32", ()
    config.data.train, config.data.mixture = "emoji:unseen_concepts", ml_collections.ConfigDict(parts)
    return config


def pages(batch_size: int = 8, weight: float = 1.0) -> ml_collections.ConfigDict:
    return stream(images=2, frames=1, tokens=40, batch_size=batch_size, weight=weight)


def pairs(batch_size: int = 8, weight: float = 0.3, **more: Any) -> ml_collections.ConfigDict:
    part = stream(images=2, frames=1, tokens=40, batch_size=batch_size, weight=weight, kind="pairs", **more)
    part.source = part.source or "emoji:train"
    return part


def filled(task: FlamingoTask, seed: int = 0) -> tuple[Any, Any]:
    """(trainable, frozen) of random numbers, gates and adapters open, without compiling anything."""
    rng = np.random.default_rng(seed)

    def fill(path: str, leaf: Any) -> Any:
        values = rng.normal(size=leaf.shape) * 0.2 + path.endswith("scale")
        return jnp.asarray(values, leaf.dtype)

    params = sharding.unbox(jax.eval_shape(task.init, jax.random.key(0))[0])
    flat = {path: fill(path, leaf) for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    return train_state.partition(
        traverse_util.unflatten_dict(flat, sep="/"), train_state.matches_any(task.config.frozen)
    )


def batch_of(task: FlamingoTask, name: str) -> dict[str, np.ndarray]:
    stream = task.streams()[name]
    elements = [stream.element(i) for i in range(stream.batch_size)]
    return {key: np.stack([e[key] for e in elements]) for key in elements[0] if key != "rejected"}


def largest(tree: Any) -> float:
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def separate() -> tuple[Any, Any, dict[str, Any], dict[str, tuple[float, Any]]]:
    """(trainable, frozen, batches, loss and gradient of each data set by itself), on one device, in one piece."""
    task = FlamingoTask(config_of(pages=pages(), pairs=pairs()), mesh_of(ONE))
    trainable, frozen = filled(task)
    batches = {name: batch_of(task, name) for name in task.streams()}
    gradient = jax.jit(jax.value_and_grad(lambda t, b: task.loss(t, frozen, {}, b, jax.random.key(0))[0]))
    with jax.default_matmul_precision("highest"):
        found = {name: gradient(trainable, batch) for name, batch in batches.items()}
    return trainable, frozen, batches, {name: (float(loss), part) for name, (loss, part) in found.items()}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [ONE, EIGHT], ids=["1 device", "8 devices"])
def test_a_mixtures_losses_and_gradients_are_the_weighted_sums(shape: Mapping[str, int], separate: Any) -> None:
    trainable, frozen, batches, alone = separate
    mesh, sgd = mesh_of(shape), optax.sgd(1.0)  # an update that is the gradient
    task = FlamingoTask(config_of(pages=pages(), pairs=pairs()), mesh)
    weights = {name: part.weight for name, part in task.streams().items()}
    assert weights == {"pages": 1.0, "pairs": 0.3}
    with sharding.use_mesh(mesh), jax.default_matmul_precision("highest"):
        create = train_state.create_fn(task, sgd, task.config.frozen)
        _, placed = train_state.abstract_state(create, mesh, sharding.DEFAULT_RULES)
        state = train_state.TrainState(
            jnp.zeros((), jnp.int32), trainable, frozen, {}, sgd.init(trainable), new_guard()
        )
        state = jax.device_put(jax.tree.map(jnp.copy, state), placed)
        step = train_state.jit_train_step(train_state.train_step_fn(task, sgd, 0), placed, mesh)
        after, metrics = step(state, jax.device_put(batches, sharding.batch_sharding(mesh)))
    for name, (loss, _) in alone.items():
        np.testing.assert_allclose(float(metrics[f"{name}/loss"]), loss, rtol=2e-6)
    np.testing.assert_allclose(float(metrics["loss"]), sum(w * alone[n][0] for n, w in weights.items()), rtol=2e-6)
    expected = jax.tree.map(
        lambda a, b: weights["pages"] * a + weights["pairs"] * b, alone["pages"][1], alone["pairs"][1]
    )
    got = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), trainable, after.trainable)
    difference = jax.tree.map(lambda a, b: a - np.asarray(b), got, expected)
    assert largest(difference) <= 5e-6 * largest(expected)
    for before, now in zip(jax.tree.leaves(frozen), jax.tree.leaves(after.frozen), strict=True):
        np.testing.assert_array_equal(before, now)


class Toy:
    """A task of one weight and two data sets, whose loss is weight · x."""

    def __init__(self, schedule: str):
        self.schedule = schedule

    def streams(self) -> dict[str, Stream]:
        return {name: Stream(lambda i: {}, 1, weight) for name, weight in (("a", 1.0), ("b", 0.5))}

    def loss(self, trainable: Any, frozen: Any, state: Any, batch: Any, rng: jax.Array) -> Any:
        return (trainable["w"] * batch["x"]).mean(), ({"x": batch["x"].mean()}, state)


def test_data_sets_may_take_turns() -> None:
    batches = {"a": {"x": jnp.array([3.0])}, "b": {"x": jnp.array([5.0])}}
    sgd = optax.sgd(1.0)
    state = train_state.TrainState(jnp.zeros((), jnp.int32), {"w": jnp.ones(())}, {}, {}, sgd.init({"w": jnp.ones(())}))
    step: Any = jax.jit(train_state.train_step_fn(Toy("round_robin"), sgd, 0))  # type: ignore[arg-type]
    weights, shown = [1.0], []
    for _ in range(4):
        state, metrics = step(state, batches)
        weights.append(float(state.trainable["w"]))
        shown.append((int(metrics["stream"]), float(metrics["x"])))
    assert weights == [1.0, -2.0, -4.5, -7.5, -10.0]  # 3 · 1.0, then 5 · 0.5, …
    assert shown == [(0, 3.0), (1, 5.0)] * 2
    step = train_state.train_step_fn(Toy("accumulate"), sgd, 0)  # type: ignore[arg-type]
    assert float(step(state, batches)[0].trainable["w"]) == -10.0 - 5.5
    found = [train_state.examples_of_a_step(Toy(how)) for how in ("accumulate", "round_robin")]  # type: ignore[arg-type]
    assert found == [2, 1]
    with pytest.raises(ConfigError, match="data.schedule 'merged': expected one of accumulate, round_robin"):
        train_state.train_step_fn(Toy("merged"), sgd, 0)  # type: ignore[arg-type]


def abstract(config: ml_collections.ConfigDict) -> train_state.TrainState:
    task, optimizer = FlamingoTask(config, mesh_of(ONE)), optax.adam(1.0)
    create = train_state.create_fn(task, optimizer, config.frozen)
    return sharding.unbox(jax.eval_shape(create, jax.random.key(0)))


def test_what_is_frozen_is_chosen_by_pattern_and_held_in_its_own_precision() -> None:
    config = config_of(pairs=pairs())
    config.frozen_dtype, config.adapters.patterns = "bfloat16", QUERY_VALUE
    config.frozen = (*config.frozen, "!language_model/final_norm", "resampler/.*norm")
    state = abstract(config)
    trained, kept = (train_state.leaf_paths(tree) for tree in (state.trainable, state.frozen))
    language_model = {path for path in trained if "language_model" in path}
    factors = {f"adapters/language_model/blocks/{name}/kernel/{f}" for name in ("query", "value") for f in "ab"}
    assert language_model == factors | {"language_model/final_norm/scale"}
    assert "resampler/final_norm/scale" in kept and "resampler/latents" in trained
    assert not any(path.startswith("vision") for path in trained)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.frozen)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    moments = state.opt_state[0]
    assert train_state.leaf_paths(moments.mu) == train_state.leaf_paths(moments.nu) == trained

    paths = train_state.leaf_paths(state.params)
    for pattern, message in (
        ("languge_model/", "frozen 'languge_model/' matches no parameter; the nearest is language_model/"),
        ("!vison/projection", "'!vison/projection' matches no parameter; the nearest is vision/projection"),
        ("vision(", r"pattern 'vision\(': not a regular expression"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_state.check_patterns("frozen", ["vision/", pattern], paths)
    config.adapters.patterns = ("language_model/blocks/qeury",)
    with pytest.raises(
        ConfigError, match="adapters.patterns 'language_model/blocks/qeury' matches .*blocks/query/kernel"
    ):
        abstract(config)
    config.adapters.patterns, config.frozen = (), ("visoin/",)
    with pytest.raises(ConfigError, match="frozen 'visoin/' matches no parameter"):
        abstract(config)


def test_a_source_may_be_stored_in_another_precision(tmp_path: Path) -> None:
    w = np.linspace(0, 1, 7, dtype=np.float32)
    checkpoint.write(tmp_path / "a", {"params.m": {"m": {"w": w}}}, {})
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def wanted(dtype: str, shape: tuple[int, ...] = (7,)) -> Any:
        return {"params.m": {"m": {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=where)}}}

    got = checkpoint.restore(tmp_path / "a", wanted("bfloat16"), cast=True)["params.m"]["m"]["w"]
    np.testing.assert_array_equal(got, w.astype("bfloat16"))
    for other, cast in ((wanted("bfloat16"), False), (wanted("int32"), True), (wanted("float32", (8,)), True)):
        with pytest.raises(CheckpointError, match=r"w is float32\[7\]; this model expects"):
            checkpoint.restore(tmp_path / "a", other, cast=cast)


MAPS = ("language_model/blocks/(query|value|out|down)/",)  # of every form: one or two dimensions in, one or two out


def test_adapters_add_a_product_of_two_factors() -> None:
    """Their outputs and gradients are those of the dense sum W + (alpha/r)·A·B; fresh ones change no bit."""
    config = config_of(pairs=pairs())
    config.adapters.patterns, config.adapters.rank, config.adapters.alpha = MAPS, 3, 6.0
    task = FlamingoTask(config, mesh_of(ONE))
    params = train_state.merge(*filled(task))
    factors = traverse_util.flatten_dict(params[adapters.NAME], sep="/")
    K = "language_model/blocks/{}/kernel/{}"
    shapes = {
        name: (factors[K.format(name, "a")].shape, factors[K.format(name, "b")].shape) for name in ("query", "out")
    }
    assert shapes == {"query": ((2, 32, 3), (2, 3, 4, 8)), "out": ((2, 4, 8, 3), (2, 3, 32))}

    model = build_language_model(config.model.language_model, "float32")
    text = np.random.default_rng(1).integers(0, 4096, (2, 9))
    target = np.random.default_rng(2).normal(size=(2, 9, 4096)).astype(np.float32)

    def logits(params: Any) -> jax.Array:
        return model.apply({"params": params["language_model"]}, text)

    def loss(join: Any, factors: Any) -> jax.Array:
        return (logits(join(params | {adapters.NAME: factors}, 2.0)) * target).sum()

    with jax.default_matmul_precision("highest"):
        value = jax.jit(jax.value_and_grad(partial(loss, adapters.attach)))
        (got, gradient), (dense, expected) = (
            value(params[adapters.NAME]),
            jax.jit(jax.value_and_grad(partial(loss, adapters.merge)))(params[adapters.NAME]),
        )
    np.testing.assert_allclose(got, dense, rtol=1e-4)
    difference = jax.tree.map(lambda a, b: a - b, gradient, expected)
    assert largest(difference) <= 1e-5 * largest(expected) and largest(expected) > 0.1

    # By hand, in float64, for one kernel that has two dimensions out.
    a, b = (np.asarray(factors[K.format("query", f)], np.float64) for f in "ab")
    kernel = params["language_model"]["blocks"]["query"]["kernel"]
    merged = adapters.merge(params, 2.0)
    assert adapters.NAME not in merged
    np.testing.assert_allclose(
        merged["language_model"]["blocks"]["query"]["kernel"], kernel + 2 * np.einsum("ldr,lrhk->ldhk", a, b), atol=1e-5
    )

    fresh = sharding.unbox(
        adapters.create(jax.eval_shape(lambda: initial_params(config.model)), MAPS, 3, jax.random.key(0))
    )
    assert largest({k: v for k, v in traverse_util.flatten_dict(fresh, sep="/").items() if k.endswith("/b")}) == 0
    started = jax.jit(logits)(adapters.attach(params | {adapters.NAME: fresh}, 2.0))
    np.testing.assert_array_equal(started, jax.jit(logits)(params))


def write_flamingo(path: Path, task: FlamingoTask) -> Any:
    """A checkpoint of a Flamingo with random parameters, which are returned."""
    params = train_state.merge(*filled(task, seed=5))
    plain = {name: tree for name, tree in params.items() if name != adapters.NAME}
    metadata = {"model": task.metadata() | {"adapters": None}}
    checkpoint.write(path, {f"params.{name}": {name: tree} for name, tree in plain.items()}, metadata)
    return plain


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats.json, as LLaVA's is written, 7 chats on pictures and one on a picture that is none."""
    folder = tmp_path_factory.mktemp("chats")
    rng = np.random.default_rng(0)
    records = []
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": f"a cat of {i}"}]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "6.png").write_bytes(b"no picture")
    (folder / "chats.json").write_text(json.dumps(records))
    return folder


def test_cached_features_give_the_loss_of_pixels(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(chats=instruct.get_config("debug").data.mixture.chats)
    part = config.data.mixture.chats
    part.source, part.batch_size = f"json:{chats / 'chats.json'}", 4
    config.data.augment.scale = config.data.augment.ratio = (1.0, 1.0)
    config.init.vision = config.init.flamingo = str(tmp_path / "flamingo")
    pixels = FlamingoTask(config, mesh_of(ONE))
    params, batches = write_flamingo(tmp_path / "flamingo", pixels), [batch_of(pixels, "chats")]
    config.init.vision = ""
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "config.py").write_text(
        "import json, pathlib, ml_collections\n\n\ndef get_config():\n"
        "    path = pathlib.Path(__file__).with_name('config.json')\n"
        "    return ml_collections.ConfigDict(json.loads(path.read_text()))\n"
    )
    prepare.main(  # on 8 devices
        ["features", "--config", str(tmp_path / "config.py"), "--stream", "chats", "--batch-size", "8", "--dtype",
         "float32", "--output", str(tmp_path / "features"), "--config.data.mixture.chats.frames=1"]
    )  # fmt: skip
    assert "features: 7 images of 8 records (1 left out), float32 [" in capsys.readouterr().out
    part.features = str(tmp_path / "features")
    cached = FlamingoTask(config, mesh_of(ONE))
    batches.append(batch_of(cached, "chats"))
    assert "media" in batches[0] and batches[1]["features"].shape[1:3] == (2, 1)
    np.testing.assert_array_equal(batches[0]["text"], batches[1]["text"])
    with jax.default_matmul_precision("highest"):
        one, two = (
            jax.jit(lambda p, b, task=task: task.loss(p, {}, {}, b, jax.random.key(0))[0])(params, batch)
            for task, batch in zip((pixels, cached), batches, strict=True)
        )
    np.testing.assert_allclose(two, one, rtol=1e-6)

    assert set(cached.sources()) == set(params)
    part.frames = 3
    with pytest.raises(ConfigError, match=r"data.mixture.chats.features: frames is 1 in .*; this run has 3: prepare"):
        cached.sources()
    part.frames = 1
    params["vision"]["projection"] = params["vision"]["projection"] + 1
    checkpoint.write(tmp_path / "other", {"params.vision": {"vision": params["vision"]}}, {})
    with pytest.raises(ConfigError, match=r"data.mixture.chats.features: tower is '\w+.* in .*; this run has '\w+"):
        cached._check_features(str(tmp_path / "other"))
    with pytest.raises(DataError, match="exists already"):
        prepare_features(pixels, "chats", tmp_path / "features", batch_size=8)
    with pytest.raises(ConfigError, match="no stream 'pairs' of pages in data.mixture; there are chats"):
        prepare_features(pixels, "pairs", tmp_path / "more", batch_size=8)
    (tmp_path / "features" / "manifest.json").unlink()
    with pytest.raises(DataError, match="features: no finished features there"):
        FlamingoTask(config, mesh_of(ONE)).streams()


@pytest.mark.slow
def test_instruction_tuning_starts_from_a_flamingo_and_resumes_exactly(chats: Path, tmp_path: Path) -> None:
    config = instruct.get_config("debug")
    plain = config_of()
    config.model = plain.model
    config.data.mixture.chats.source = f"json:{chats / 'chats.json'}"
    config.init.flamingo, config.data.max_rejected_share = str(tmp_path / "flamingo"), 1.0
    task = FlamingoTask(config, mesh_of(ONE))
    source = write_flamingo(tmp_path / "flamingo", task)

    whole = train(config, task, tmp_path / "whole", mesh_of(ONE))
    expected = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
    assert [row["step"] for row in expected] == [1, 2, 3, 4]
    for name in ("vision", "language_model"):
        for kept, came in zip(jax.tree.leaves(whole.frozen[name]), jax.tree.leaves(source[name]), strict=True):
            np.testing.assert_array_equal(kept, np.asarray(came).astype("bfloat16"))  # held so, and never changed
    factors = traverse_util.flatten_dict(whole.trainable[adapters.NAME], sep="/")
    assert set(factors) == {f"language_model/blocks/{n}/kernel/{f}" for n in ("query", "value") for f in "ab"}
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in factors.values())  # B is no longer zero

    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoints" / "00000004")
    train(config, task, tmp_path / "killed", mesh_of(ONE))
    got = [row for row in read_metrics(tmp_path / "killed") if "loss" in row]
    assert [(row["loss"], row["gradient_norm"]) for row in got] == [
        (row["loss"], row["gradient_norm"]) for row in expected
    ]

    config.init.flamingo = str(tmp_path / "whole")  # what was tuned may be tuned on, with the same adapters
    assert adapters.NAME in task.sources()
    config.adapters.rank = 4
    with pytest.raises(ConfigError, match="init.flamingo: rank is 8 in the checkpoint; this config expects 4"):
        task.sources()
    config.model.interval = 1
    with pytest.raises(ConfigError, match="init.flamingo: interval is 2 in the checkpoint; this config expects 1"):
        task.sources()
