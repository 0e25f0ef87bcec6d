"""What a Flamingo learns from and what is trained of it: mixtures, frozen parts, adapters, cached features."""

import json
from collections.abc import Mapping
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
from clip_jax.errors import ConfigError
from clip_jax.models.variants import get_variant as get_clip
from clip_jax.training import state as train_state
from configs.flamingo import instruct
from configs.flamingo.common import stream
from flamingo_jax import adapters
from flamingo_jax.training.flamingo_task import FlamingoTask

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
    part = stream(images=1, frames=1, tokens=24, batch_size=batch_size, weight=weight, kind="pairs", **more)
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


@pytest.mark.parametrize("shape", [ONE, EIGHT], ids=["1 device", "8 devices"])
def test_a_mixtures_losses_and_gradients_are_the_weighted_sums(shape: Mapping[str, int], separate: Any) -> None:
    trainable, frozen, batches, alone = separate
    mesh, sgd = mesh_of(shape), optax.sgd(1.0)  # an update that is the gradient
    task = FlamingoTask(config_of(pages=pages(), pairs=pairs()), mesh)
    weights = {name: part.weight for name, part in task.streams().items()}
    assert weights == {"pages": 1.0, "pairs": 0.3}
    with sharding.use_mesh(mesh), jax.default_matmul_precision("highest"):
        create = train_state.create_fn(task, sgd, task.config.frozen)
        abstract, placed = train_state.abstract_state(create, mesh, sharding.DEFAULT_RULES)
        state = train_state.TrainState(jnp.zeros((), jnp.int32), trainable, frozen, {}, sgd.init(trainable))
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
