"""Micro-batches: the gradient of the whole batch, in the memory of a part of it."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.losses import ring
from clip_jax.training.clip_task import ClipTask
from configs.clip import emoji_vit, quickstart

END = 4095


def make_config(micro_batches: int, **changes: Any) -> ml_collections.ConfigDict:
    config = emoji_vit.get_config("debug")
    config.data.group_by_text = False
    config.update({"micro_batches": micro_batches, **changes})
    return config


def make_batch(task: ClipTask, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    model = task.config.model
    side, length = model.vision.image_size, model.text.context_length
    text = rng.integers(1, END, size=(size, length), dtype=np.int32)
    text[:, -1] = END
    return {"image": rng.integers(0, 256, size=(size, side, side, 3), dtype=np.uint8), "text": text}


def gradient_fn(task: ClipTask) -> Any:
    def loss(params: Any, batch: Any) -> tuple[jax.Array, Any]:
        return task.loss(params, {}, {}, batch, jax.random.key(0))

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(("devices", "loss"), [(1, "softmax"), (8, "softmax"), (8, "sigmoid")])
def test_every_gradient_is_that_of_the_whole_batch(devices: int, loss: str) -> None:
    mesh = sharding.make_mesh({"fsdp": devices}, jax.devices()[:devices])
    results = []
    for k in (1, 4):
        task = ClipTask(make_config(k, loss=loss), mesh)
        params = sharding.unbox(task.init(jax.random.key(0))[0])
        batch = jax.device_put(make_batch(task, 32), sharding.batch_sharding(mesh))
        with sharding.use_mesh(mesh):
            results.append(gradient_fn(task)(params, batch))
    ((whole, (scalars, _)), expected), ((value, _), got) = results
    assert ("logit_bias" in scalars) == ("logit_bias" in expected) == (loss == "sigmoid")
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    floor = 1e-3 * max(float(jnp.abs(e).max()) for e in jax.tree.leaves(expected))  # some are zero but for rounding
    for (path, e), g in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True):
        error, largest = float(jnp.abs(g - e).max()), max(float(jnp.abs(e).max()), floor)
        assert error <= 1e-5 * largest, f"{jax.tree_util.keystr(path)}: {error} of {largest}"


def compile_for(k: int, micro_batch: int, mesh: Mesh) -> tuple[int, str]:
    """(temporaries in bytes on each device, the program) of a gradient of k micro-batches."""
    config = make_config(k)
    config.model.embed_dim = 256
    task = ClipTask(config, mesh)
    params, _ = task.abstract_variables()
    where = sharding.batch_sharding(mesh)
    batch = {
        key: jax.ShapeDtypeStruct((k * micro_batch, *x.shape[1:]), x.dtype, sharding=where)
        for key, x in make_batch(task, 1).items()
    }
    with sharding.use_mesh(mesh):
        compiled = gradient_fn(task).lower(params, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()


@pytest.mark.slow
def test_memory_grows_with_the_embeddings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "TILE", 16)  # the loss's own part, which would grow up to its full tiles
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    few, many, at_once = (compile_for(k, size, mesh)[0] for k, size in ((2, 64), (8, 64), (1, 512)))
    pairs = (8 - 2) * 64
    assert many - few <= pairs * 2 * 256 * 4  # two float32 embeddings of width 256
    assert at_once - few > 4 * (many - few)


def test_no_example_leaves_its_device() -> None:
    # Parameters are replicated: looking up a sharded token embedding moves ids, in whatever batches they come.
    _, program = compile_for(4, 16, sharding.make_mesh({"replica": 8}))
    moved = [line for line in program.splitlines() if re.search(r"(all-gather|all-to-all|collective-permute)\(", line)]
    assert moved  # texts round the ring
    assert not [line for line in moved if "u8[" in line or re.search(r"s32\[\d+,", line)]


def test_what_cannot_be_is_named() -> None:
    mesh = sharding.make_mesh({"fsdp": 8})
    with pytest.raises(ConfigError, match="micro_batches 2 with a ResNet: BatchNorm statistics would be those of a"):
        config = quickstart.get_config("debug")
        config.micro_batches = 2
        ClipTask(config, mesh)
    with pytest.raises(
        ConfigError, match="micro_batches 2 with dropout: every micro-batch would draw the same; expected"
    ):
        config = make_config(2)
        config.model.vision.patch_dropout = 0.5
        ClipTask(config, mesh)
    config.frozen = ("vision/",)  # a locked tower drops nothing
    ClipTask(config, mesh)
    task = ClipTask(make_config(3), mesh)
    params = sharding.unbox(jax.eval_shape(task.init, jax.random.key(0))[0])
    with pytest.raises(ConfigError, match="micro_batches 3: expected a divisor of 2, the examples that each of the 8"):
        jax.eval_shape(gradient_fn(task), params, make_batch(task, 16))
    with pytest.raises(ConfigError, match="loss 'hinge': expected softmax or sigmoid"):
        ClipTask(make_config(1, loss="hinge"), mesh)
    with pytest.raises(ConfigError, match=r"label_smoothing 0.1 with loss sigmoid: .* 0 unless loss is softmax"):
        ClipTask(make_config(1, loss="sigmoid", label_smoothing=0.1), mesh)
