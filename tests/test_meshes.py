"""The same weights and batch on every mesh of 8: the same loss and gradients, and no array put together whole."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.losses import contrastive_loss, sigmoid_loss
from clip_jax.losses.next_token import next_token_losses
from clip_jax.models.variants import build_two_tower, get_variant
from flamingo_jax.models import variants as flamingo_variants
from launch.planning.hlo import Program

# No parameter, and no part of a batch, has a dimension that is a multiple of 24.
BATCH, IMAGES, TOKENS = 24, 3, 11
VOCABULARY = 500  # few enough that its table is not most of the parameters
MESHES = [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1), (1, 4, 2), (4, 1, 2), (4, 2, 1), (2, 4, 1), (2, 1, 4), (1, 1, 8)]
PAIRS = ("CLIP", "SigLIP", "ResNet", "NFNet")


@dataclass(frozen=True)
class Case:
    model: Any
    boxed: Any
    batch: dict[str, jax.Array]
    trained: tuple[str, ...]

    def loss(self, trained: Any, rest: Any, batch: Any, mesh: Mesh) -> jax.Array:
        variables = {**rest, "params": {**rest["params"], **trained}}
        if "media" in batch:
            losses = next_token_losses(self.model.apply(variables, batch), batch["text"])
            return losses.mean()
        state = [key for key in rest if key != "params"]
        (image, text, scalars), _ = self.model.apply(variables, batch, train=True, mutable=state)
        function = sigmoid_loss if "logit_bias" in scalars else contrastive_loss
        scalars = {key: scalars[key] for key in ("logit_scale", "logit_bias") if key in scalars}
        return function(image, text, **scalars, mesh=mesh, axis_names=sharding.BATCH_AXES)


@cache
def case(name: str, dtype: str = "float32") -> Case:
    rng = np.random.default_rng(0)
    if name in PAIRS:
        config = get_variant({"ResNet": "debug-RN", "NFNet": "debug-NFNet"}.get(name, "debug-ViT"))
        # Large enough that the ResNet's last BatchNorm has more than the batch to go by.
        size = config.vision.image_size = 64 if name in ("ResNet", "NFNet") else 32
        if name == "SigLIP":
            like = get_variant("SigLIP-B/16")
            config.vision.pool, config.text.pool, config.text.causal = "map", "last", False
            config.text.projection_bias, config.activation = True, like.activation
            config.init_logit_scale, config.init_logit_bias = like.init_logit_scale, like.init_logit_bias
        length = config.text.context_length = 13
        config.text.vocab_size, config.dtype = VOCABULARY, dtype
        if "end_id" in config.text:
            config.text.end_id = VOCABULARY - 1
        model: Any = build_two_tower(config)
        batch: dict[str, Any] = {
            "image": rng.normal(size=(BATCH, size, size, 3)).astype(np.float32),
            "text": rng.integers(1, VOCABULARY, size=(BATCH, length)),
        }
        trained = ("vision", "text", "logit_scale") + (("logit_bias",) if name == "SigLIP" else ())
    else:
        config = flamingo_variants.get_variant("debug")
        config.remat, config.language_model.vocab_size = True, VOCABULARY
        model = flamingo_variants.build_flamingo(config)
        size, frames = config.vision.image_size, config.resampler.frames
        seen = np.array([0, 4, 7]) <= np.arange(TOKENS)[:, None]
        batch = {
            "media": rng.normal(size=(BATCH, IMAGES, frames, size, size, 3)).astype(np.float32),
            "frame_mask": np.arange(frames) < rng.integers(1, frames + 1, size=(BATCH, IMAGES, 1)),
            "text": rng.integers(1, VOCABULARY, size=(BATCH, TOKENS)),
            "text_mask": np.ones((BATCH, TOKENS), bool),
            "media_mask": np.broadcast_to(seen & (seen.sum(1, keepdims=True) == [1, 2, 3]), (BATCH, TOKENS, IMAGES)),
        }
        trained = ("resampler", "gated", "extra_embedding", "extra_head")
    arrays = {key: jnp.asarray(value) for key, value in batch.items()}
    return Case(model, jax.eval_shape(model.init, jax.random.key(0), arrays), arrays, trained)


@cache
def start(name: str) -> Any:
    """Weights off their initial values, where scales and gates of zero cut off whole branches."""
    this, rng = case(name), np.random.default_rng(1)
    values = sharding.unbox(jax.jit(this.model.init)(jax.random.key(0), this.batch))
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).clip(-2, 2).astype(np.float32), values)


def run(name: str, mesh: Mesh) -> tuple[jax.Array, Any, Program]:
    """(loss, gradients, compiled program) on a mesh, of weights that do not depend on it."""
    this = case(name)
    where = sharding.tree_shardings(this.boxed, mesh)
    with sharding.use_mesh(mesh), jax.default_matmul_precision("highest"):
        variables = jax.device_put(start(name), where)
        trained = {key: variables["params"].pop(key) for key in this.trained}
        batch = jax.device_put(this.batch, sharding.batch_sharding(mesh))
        step = jax.jit(
            jax.value_and_grad(lambda trained, rest, batch: this.loss(trained, rest, batch, mesh)),
            out_shardings=(sharding.replicated(mesh), {key: where["params"][key] for key in this.trained}),
        )
        compiled = step.lower(trained, variables, batch).compile()
        loss, gradients = compiled(trained, variables, batch)
    text = compiled.as_text()
    assert text is not None
    return loss, jax.tree.map(np.asarray, gradients), Program(text)


@cache
def on_one_device(name: str) -> tuple[Any, Any]:
    """(loss, gradients); of pairs in float64, as one device sums all places of all images, one after the other."""
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    if name not in PAIRS:
        return run(name, mesh)[:2]
    first = start(name)
    with jax.enable_x64(True):
        this = case(name, "float64")
        rest = jax.tree.map(lambda x: np.asarray(x, np.float64), first)
        batch = {key: np.asarray(x, np.float64 if key == "image" else x.dtype) for key, x in this.batch.items()}
        trained = {key: rest["params"].pop(key) for key in this.trained}
        loss, gradients = jax.jit(jax.value_and_grad(this.loss), static_argnums=3)(trained, rest, batch, mesh)
        return np.asarray(loss), jax.tree.map(np.asarray, gradients)


def gathered(program: Program) -> Iterator[tuple[str, list[tuple[int, ...]], int]]:
    """(scope, shapes, bytes) of what each all-gather of numbers puts together; ids are small."""
    for computation, instruction, _ in program.executed():
        for _, inner in program.inside(computation, instruction):
            if inner.opcode in ("all-gather", "all-gather-start"):
                # A start's result holds what goes in, too.
                arrays = inner.arrays[len(inner.arrays) // 2 :] if inner.opcode.endswith("start") else inner.arrays
                if any(array.dtype.startswith(("f", "bf")) for array in arrays):
                    yield inner.scope, [array.shape for array in arrays], sum(array.bytes for array in arrays)


def whole_activations(program: Program) -> list[tuple[str, list[tuple[int, ...]]]]:
    """All-gathers whose result has all examples, in whatever it was reshaped to. What the loss exchanges is no such."""
    return [
        (scope, shapes)
        for scope, shapes, _ in gathered(program)
        if ")/shard_map" not in scope and any(size and size % BATCH == 0 for shape in shapes for size in shape)
    ]


def heavy(name: str, shape: tuple[int, int, int]) -> bool:
    return name in ("ResNet", "NFNet") or shape not in MESHES[: 3 if name != "SigLIP" else 2]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(name, shape, marks=[pytest.mark.slow] * heavy(name, shape), id=f"{name}-{shape}")
        for name in ("CLIP", "SigLIP", "Flamingo", "ResNet", "NFNet")
        for shape in (MESHES if name not in ("ResNet", "NFNet") else MESHES[:4])
    ],
)
def test_every_mesh_of_8_gives_the_same_loss_and_gradients(name: str, shape: tuple[int, int, int]) -> None:
    expected_loss, expected = on_one_device(name)
    loss, gradients, program = run(name, sharding.make_mesh(dict(zip(sharding.MESH_AXES, shape, strict=True))))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(expected))
    for got, one in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        assert np.abs(got - one).max() <= 1e-5 * largest

    if name in ("ResNet", "NFNet"):  # so small that what they gather, pooled or a group's, is more than their weights
        return
    if shape[0] * shape[1] > 1:  # else each device has all examples
        assert not whole_activations(program)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(sharding.unbox(case(name).boxed)["params"])]
    assert max((size for _, _, size in gathered(program)), default=0) < sum(sizes) / 2


def test_a_whole_activation_is_found() -> None:
    mesh = sharding.make_mesh()
    x = jax.ShapeDtypeStruct((BATCH, 5, 7), jnp.float32, sharding=sharding.batch_sharding(mesh))
    text = jax.jit(lambda x: jnp.sin(x), out_shardings=sharding.replicated(mesh)).lower(x).compile().as_text()
    assert text is not None and len(whole_activations(Program(text))) == 1
