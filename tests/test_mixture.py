"""Several data sets in a step: their gradients, their order, what can't be."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from clip_jax import sharding
from clip_jax.data.pipeline import Batches
from clip_jax.errors import ConfigError
from clip_jax.training import state as train_state
from clip_jax.training.clip_task import ClipTask
from configs.clip import emoji_vit
from configs.clip.common import data_set


def mixed(micro_batches: int = 1, **parts: Any) -> ml_collections.ConfigDict:
    config = emoji_vit.get_config("debug")
    config.micro_batches, config.data.train = micro_batches, ""
    config.data.mixture.update(parts)
    return config


TWO = {"seen": data_set("emoji:train", 16, 1.0), "few": data_set("emoji:unseen_concepts", 8, 0.3)}


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "micro_batches"), [(1, 1), (4, 2)])
def test_gradients_are_the_weighted_sum_of_separate_ones(devices: int, micro_batches: int) -> None:
    mesh = sharding.make_mesh({"fsdp": devices}, jax.devices()[:devices])
    task = ClipTask(mixed(micro_batches, **TWO), mesh)
    drawn = {name: (stream.batch_size, stream.weight) for name, stream in task.streams().items()}
    assert drawn == {
        "seen": (16, 1.0),
        "few": (8, 0.3),
    }
    batches = {}
    for name, stream in task.streams().items():
        elements = [stream.element(i) for i in range(stream.batch_size)]
        rows = {key: np.stack([e[key] for e in elements]) for key in ("image", "text")}
        batches[name] = jax.device_put(rows, sharding.batch_sharding(mesh))
    sgd = optax.sgd(1.0)  # an update that is the gradient
    with sharding.use_mesh(mesh):
        create = train_state.create_fn(task, sgd, ())
        before = jax.jit(lambda key: sharding.unbox(create(key)))(jax.random.key(0))
        after, metrics = jax.jit(train_state.train_step_fn(task, sgd, 0))(before, batches)

        alone = ClipTask(mixed(seen=TWO["seen"]), mesh)  # in one piece
        gradient = jax.jit(jax.value_and_grad(lambda p, b: alone.loss(p, {}, {}, b, jax.random.key(0))[0]))
        parts = {name: gradient(before.trainable, batch) for name, batch in batches.items()}
    loss = sum(TWO[name].weight * float(value) for name, (value, _) in parts.items())
    np.testing.assert_allclose(float(metrics["loss"]), loss, rtol=1e-5)
    np.testing.assert_allclose(float(metrics["few/loss"]), float(parts["few"][0]), rtol=1e-5)
    expected = jax.tree.map(lambda a, b: a + 0.3 * b, parts["seen"][1], parts["few"][1])
    scale = max(float(jnp.abs(e).max()) for e in jax.tree.leaves(expected))
    for start, end, e in zip(*map(jax.tree.leaves, (before.trainable, after.trainable, expected)), strict=True):
        assert float(jnp.abs((start - end) - e).max()) <= 1e-5 * scale


def test_a_step_holds_the_same_pairs_after_a_resume() -> None:
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    same = {name: data_set("emoji:unseen_concepts", 4, 1.0) for name in ("a", "b")}
    drawn: dict[str, list[Any]] = {}
    for name, stream in ClipTask(mixed(**same), mesh).streams().items():
        read = Batches(stream.element, stream.batch_size, np.arange(4))
        drawn[name], resumed = list(read(0, 5)), list(read(3, 5))
        for whole, rest in zip(drawn[name][3:], resumed, strict=True):
            assert all(np.array_equal(whole[key], rest[key]) for key in ("image", "text"))
    assert not np.array_equal(drawn["a"][0]["image"], drawn["b"][0]["image"])  # each in an order of its own

    config = emoji_vit.get_config("debug")  # one data set by itself: the order of a mixture's first
    config.data.train, config.batch_size = "emoji:unseen_concepts", 4
    (alone,) = ClipTask(config, mesh).streams().values()
    assert (alone.batch_size, alone.weight) == (4, 1.0)
    assert np.array_equal(alone.element(3)["image"], drawn["a"][0]["image"][3])


def test_what_cannot_be_is_named() -> None:
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    with pytest.raises(ConfigError, match="data.train 'emoji:train' and data.mixture of few, seen: expected one of"):
        config = mixed(**TWO)
        config.data.train = "emoji:train"
        ClipTask(config, mesh)
    with pytest.raises(ConfigError, match="data.train '' and data.mixture of nothing: expected one of them"):
        ClipTask(mixed(), mesh)
    with pytest.raises(ConfigError, match="data.mixture.a: weight; expected the fields batch_size, source, weight"):
        ClipTask(mixed(a={"source": "emoji:train", "batch_size": 8}), mesh)
