"""The towers against open_clip's, their published sizes, and float64 gradients of the whole model."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.losses import contrastive_loss
from clip_jax.models.two_tower import TwoTower
from clip_jax.models.variants import build_two_tower, get_variant
from clip_jax.models.vit import drop_patches
from clip_jax.sharding import make_mesh
from clip_jax.training.clip_task import ClipTask
from configs.clip import emoji_vit

PUBLISHED = {  # millions
    "RN50": 102.01, "RN101": 119.69, "RN50x4": 178.30, "RN50x16": 290.98, "RN50x64": 623.26,
    "ViT-B/32": 151.28, "ViT-B/16": 149.62, "ViT-L/14": 427.62, "ViT-L/14@336": 427.94,
}  # fmt: skip
COUNTED = {  # the peers' own modules, counted: open_clip 3.3.0 and transformers 5.23.0
    "ViT-S-32": 63_085_825, "ViT-S-16": 62_257_537, "ViT-M-32": 103_119_873, "ViT-M-16": 102_015_489,
    "ViT-B-32": 151_277_313, "ViT-B-16": 149_620_737, "ViT-B-16-plus-240": 208_377_345,
    "ViT-L-14": 427_616_513, "ViT-L-14-336": 427_944_193, "ViT-H-14": 986_109_441, "ViT-H-14-378": 986_714_881,
    "ViT-g-14": 1_366_678_273, "ViT-bigG-14": 2_539_567_105,
    "SigLIP-B/16": 203_155_970, "SigLIP-B/16@256": 203_202_050, "SigLIP-L/16@256": 652_150_786,
    "SigLIP-So400m/14": 877_360_306, "SigLIP-So400m/14@384": 877_960_498,
}  # fmt: skip


def abstract(model: TwoTower, size: int, length: int) -> Any:
    batch = {
        "image": jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32),
        "text": jax.ShapeDtypeStruct((2, length), jnp.int32),
    }
    return sharding.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))


def count(name: str) -> int:
    config = get_variant(name)
    params = abstract(build_two_tower(config), config.vision.image_size, config.text.context_length)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name: str) -> None:
    assert round(count(name) / 1e6, 2) == PUBLISHED[name]
    assert name != "ViT-B/32" or count(name) == 151_277_313


@pytest.mark.parametrize("name", COUNTED)
def test_parameter_counts_of_the_peers(name: str) -> None:
    assert count(name) == COUNTED[name]


def dense_loss(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
    logits = scale * image @ text.T
    rows, columns = jax.nn.log_softmax(logits, axis=1), jax.nn.log_softmax(logits, axis=0)
    return -(jnp.diagonal(rows) + jnp.diagonal(columns)).mean() / 2


def assert_gradients_close(got: Any, exact: Any, tolerance: float = 1e-5) -> None:
    """Every leaf within `tolerance` of its own largest value."""
    largest = max(np.abs(e).max() for e in jax.tree.leaves(exact))
    for (path, g), e in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(exact), strict=True):
        name, error = jax.tree_util.keystr(path), np.abs(np.float64(g) - np.float64(e)).max()
        if name.endswith("['key']['bias']"):  # shifts all logits of a query alike: it has no gradient
            assert np.abs(e).max() < 1e-6 * largest and error < 1e-6 * largest, name
        else:
            cancels = 10 if name.endswith("['skip_gain']") else 1  # one number, the sum over whole feature maps
            assert error <= cancels * tolerance * np.abs(e).max(), f"{name}: {error} of {np.abs(e).max()}"


def off_the_start(name: str) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """A variant's config, weights off their initial values (where scales of zero cut off whole branches), a batch."""
    config = get_variant(name)
    config.vision.image_size = 64  # so that the ResNet ends in more than one place
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(16, 64, 64, 3)).astype(np.float32),
        "text": rng.integers(1, 4094, size=(16, config.text.context_length)).astype(np.int32),
    }
    batch["text"][:, -1] = 4095
    variables = jax.jit(build_two_tower(config).init)(jax.random.key(0), batch)
    variables = jax.tree.map(
        lambda x: x + 0.1 * np.float32(rng.normal(size=x.shape)).clip(-3, 3), sharding.unbox(variables)
    )
    return config, variables, batch


def loss_of(params: Any, rest: Any, batch: Any, model: TwoTower, final: Any) -> jax.Array:
    (image, text, extras), _ = model.apply({"params": params, **rest}, batch, train=True, mutable=list(rest))
    return final(image, text, extras["logit_scale"])


@cache
def exact_gradients(name: str) -> Any:
    """In float64 on one device, of the inputs as float32 has them."""
    config, variables, batch = off_the_start(name)
    config.dtype = "float64"
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.float64(x)), variables)
        inputs = {"image": np.float64(batch["image"]), "text": batch["text"]}
        gradient = jax.jit(jax.grad(partial(loss_of, model=build_two_tower(config), final=dense_loss)))
        return jax.tree.map(np.asarray, gradient(wide.pop("params"), wide, inputs))


@pytest.mark.parametrize(
    "name", ["debug-ViT", *(pytest.param(name, marks=pytest.mark.slow) for name in ("debug-RN", "debug-NFNet"))]
)
def test_gradients_of_both_towers_are_the_float64_ones(name: str, data_mesh: Mesh) -> None:
    config, variables, batch = off_the_start(name)
    final = partial(contrastive_loss, mesh=data_mesh, axis_names=sharding.BATCH_AXES)
    with sharding.use_mesh(data_mesh), jax.default_matmul_precision("highest"):
        placed = jax.device_put(batch, sharding.batch_sharding(data_mesh))
        rest = jax.device_put(variables, sharding.replicated(data_mesh))
        gradient = jax.jit(jax.grad(partial(loss_of, model=build_two_tower(config), final=final)))
        got = gradient(rest.pop("params"), rest, placed)
    assert_gradients_close(got, exact_gradients(name))


def test_text_after_the_end_token_changes_nothing() -> None:
    config = get_variant("debug-ViT")
    model = build_two_tower(config)
    ids = np.full((2, config.text.context_length), 7, np.int32)
    ids[:, 0], ids[:, 5] = 4094, 4095
    ids[1, 6:] = 99
    variables = sharding.unbox(model.init(jax.random.key(0), {"text": ids}))
    _, text, _ = model.apply(variables, {"text": ids})
    np.testing.assert_allclose(text[0], text[1], atol=1e-6)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_no_gradient(remat: str) -> None:
    config = get_variant("debug-ViT")
    batch = {"image": np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)}

    def gradient(config: Any) -> Any:
        model = build_two_tower(config)
        variables = sharding.unbox(model.init(jax.random.key(0), batch))
        return jax.grad(lambda v: (model.apply(v, batch)[0] * jnp.arange(config.embed_dim)).sum())(variables)

    plain = gradient(config)
    config.vision.remat = remat
    assert_gradients_close(gradient(config), plain)


def test_wrong_sizes_are_named() -> None:
    model = build_two_tower(get_variant("debug-ViT"))
    with pytest.raises(ConfigError, match="image of 40×32 pixels: expected 32×32"):
        jax.eval_shape(model.init, jax.random.key(0), {"image": jnp.zeros((1, 40, 32, 3))})
    with pytest.raises(ConfigError, match="text of 20 tokens: at most context_length 16"):
        jax.eval_shape(model.init, jax.random.key(0), {"text": jnp.zeros((1, 20), jnp.int32)})
    with pytest.raises(ConfigError, match="unknown model variant 'ViT-Z'"):
        get_variant("ViT-Z")


@pytest.mark.parametrize("pool", ["class", "map"])
def test_patch_dropout(pool: str) -> None:
    """Half of the 16 patches are left out in training, others for each example; none in evaluation."""
    config = get_variant("debug-ViT")
    config.vision.patch_dropout, config.vision.pool = 0.5, pool
    model = build_two_tower(config)
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32).repeat(64, axis=0)
    variables = sharding.unbox(model.init(jax.random.key(0), {"image": image}))
    key = jax.random.key(1)
    _, _, whole = model.apply(variables, {"image": image})
    embedding, _, part = model.apply(variables, {"image": image}, train=True, rngs={"dropout": key})
    prefix = model.vision.num_prefix_tokens
    assert whole["image_tokens"].shape[1] == prefix + 16 and part["image_tokens"].shape[1] == prefix + 8
    assert len(np.unique(np.asarray(embedding), axis=0)) > 60

    tokens = jnp.arange(16.0).reshape(1, 16, 1).repeat(4096, axis=0)
    kept = np.asarray(drop_patches(tokens, 0.7, key))[:, :, 0]
    assert kept.shape == (4096, 4) and (np.diff(kept) > 0).all()  # in their order, none twice
    share = np.bincount(kept.astype(int).ravel(), minlength=16) / 4096
    assert np.abs(share - 4 / 16).max() < 5 * (0.25 * 0.75 / 4096) ** 0.5


def test_a_training_step_draws_the_patches_it_drops() -> None:
    """The loss is a function of the step's key where patches are dropped, and of nothing but the batch where not."""
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    rng = np.random.default_rng(0)
    batch = {"image": rng.integers(256, size=(8, 32, 32, 3), dtype=np.uint8),
             "text": rng.integers(1, 4095, size=(8, 16), dtype=np.int32)}  # fmt: skip
    losses = {}
    for rate in (0.0, 0.5):
        config = emoji_vit.get_config("debug")
        config.model.vision.patch_dropout = rate
        task = ClipTask(config, mesh)
        with sharding.use_mesh(mesh):
            params, state = jax.jit(lambda key, task=task: sharding.unbox(task.init(key)))(jax.random.key(0))
            loss = jax.jit(lambda p, s, b, key, task=task: task.loss(p, {}, s, b, key)[0])
            losses[rate] = [float(loss(params, state, batch, jax.random.key(i))) for i in (0, 1, 0)]
    assert losses[0.0][0] == losses[0.0][1] == losses[0.0][2]
    assert losses[0.5][0] == losses[0.5][2] and losses[0.5][0] != losses[0.5][1]
