"""The optimiser: what decays, what is clipped and clamped, and AdamW by hand."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from clip_jax import sharding
from clip_jax.errors import ConfigError
from clip_jax.models.variants import build_two_tower, get_variant
from clip_jax.training import optimizer
from configs.clip.common import adaptive_clipping, clip_config


def test_decay_skips_biases_gains_and_the_temperature_however_they_are_stacked() -> None:
    for name in ("debug-ViT", "debug-RN", "debug-NFNet"):
        model = build_two_tower(get_variant(name))
        batch = {"image": jnp.zeros((1, 32, 32, 3)), "text": jnp.zeros((1, 12), jnp.int32)}
        params = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
        leaves = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
        mask = {optimizer.path_string(path): decays for path, decays in leaves}
        for path, decays in mask.items():
            last = path.split("/")[-1]
            skipped = ("bias", "scale", "gain", "skip_gain", "logit_scale", "class_embedding")
            assert decays == (last not in skipped), path
        assert mask["text/token_embedding"] and not mask["text/transformer/blocks/attention/query/bias"]


def test_the_temperature_stays_below_its_bound() -> None:
    transform = optimizer.clamp_logit_scale(100.0)
    params = {"logit_scale": jnp.float32(4.6), "w": jnp.ones(2)}
    updates, _ = transform.update(
        {"logit_scale": jnp.float32(0.5), "w": jnp.full(2, 9.0)}, transform.init(params), params
    )
    assert math.isclose(params["logit_scale"] + updates["logit_scale"], math.log(100), rel_tol=1e-6)
    np.testing.assert_array_equal(updates["w"], 9.0)


def test_a_step_is_adamws() -> None:
    config = clip_config("debug-ViT").optimizer
    config.lr, config.warmup_steps, config.clip_norm = 0.1, 0, 0.0
    transform = optimizer.make_optimizer(config, 1000)
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0])}
    gradients = {"kernel": jnp.array([0.5, 0.1]), "bias": jnp.array([-0.2])}
    updates, _ = transform.update(gradients, transform.init(params), params)
    for key, decay in (("kernel", 0.2), ("bias", 0.0)):
        g, p = np.float64(gradients[key]), np.float64(params[key])
        expected = -0.1 * (g / (np.abs(g) + config.eps) + decay * p)  # the first step: both moments unbiased
        np.testing.assert_allclose(updates[key], expected, rtol=1e-4)


def test_patterns_scale_learning_rates() -> None:
    config = clip_config("debug-ViT").optimizer
    config.lr, config.warmup_steps = 0.1, 0
    params = {"gated": {"gate": jnp.ones(2), "kernel": jnp.ones(2)}, "gate": jnp.ones(2)}
    plain = optimizer.make_optimizer(config, 1000)
    config.lr_factors = (("gated/gate", 30.0), ("gated/", 2.0))
    scaled = optimizer.make_optimizer(config, 1000)
    expected, _ = plain.update(params, plain.init(params), params)
    got, _ = scaled.update(params, scaled.init(params), params)
    np.testing.assert_allclose(got["gated"]["gate"], 30 * expected["gated"]["gate"], rtol=1e-6)  # the first match
    np.testing.assert_allclose(got["gated"]["kernel"], 2 * expected["gated"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(got["gate"], expected["gate"])  # a path's start, not any part of it


def test_the_schedule_warms_up_and_ends_at_zero() -> None:
    config = clip_config("debug-ViT").optimizer
    config.lr, config.warmup_steps = 1.0, 10
    schedule = optimizer.learning_rate(config, 100)
    assert [round(float(schedule(s)), 3) for s in (0, 5, 10, 55, 100)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    config.decay = "linear"
    schedule = optimizer.learning_rate(config, 110)
    assert [round(float(schedule(s)), 3) for s in (0, 5, 10, 35, 60, 110)] == [0.0, 0.5, 1.0, 0.75, 0.5, 0.0]
    config.warmup_steps = 0
    schedule = optimizer.learning_rate(config, 100)
    assert [round(float(schedule(s)), 3) for s in (0, 25, 100)] == [1.0, 0.75, 0.0]
    config.decay = "constant"
    assert [float(optimizer.learning_rate(config, 100)(s)) for s in (0, 1, 100)] == [1.0, 1.0, 1.0]
    config.warmup_steps = 10
    assert [float(optimizer.learning_rate(config, 100)(s)) for s in (0, 5, 10, 100)] == [0.0, 0.5, 1.0, 1.0]


# Of each layout one parameter: the dimensions that count its units, as positions.
UNITS = {
    "vision/stem_conv1/kernel": (3,),  # [h, w, C, F]: filters
    "vision/stage2_rest/conv2/kernel": (0, 4),  # [layers, h, w, C, F]
    "vision/stage2_rest/conv2/gain": (0,),  # [layers, F]: a vector of each layer
    "vision/stage2_rest/skip_gain": (0,),  # [layers]: scalars
    "vision/stage2_first/skip_gain": (),
    "vision/stage1_first/squeeze_excite/squeeze/kernel": (1,),  # [C, M]: columns
    "vision/stage1_first/squeeze_excite/squeeze/bias": (),
    "vision/projection": (1,),
    "text/token_embedding": (1,),
    "text/embedding_norm/scale": (),
    "text/transformer/blocks/attention/query/kernel": (0, 2, 3),  # [layers, D, H, K]: a head's dimension
    "text/transformer/blocks/attention/query/bias": (0,),  # [layers, H, K]
    "text/transformer/blocks/attention/out/kernel": (0, 3),  # [layers, H, K, D]
    "text/transformer/blocks/mlp/up/kernel": (0, 2),
    "logit_scale": (),
}


@pytest.fixture(scope="module")
def parameters() -> tuple[Any, Any, optimizer.Axes]:
    """Parameters and gradients of a pair, of sizes that clip some units and leave others; their logical axes."""
    model = build_two_tower(get_variant("debug-NFNet"))
    batch = {"image": jnp.zeros((1, 32, 32, 3)), "text": jnp.zeros((1, 12), jnp.int32)}
    boxed = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    rng = np.random.default_rng(0)

    def draw(x: Any, spread: float) -> np.ndarray:
        sizes = np.exp(spread * rng.normal(size=x.shape[-1:]))  # of the last dimension's units
        return (sizes * rng.normal(size=x.shape)).astype(np.float32)

    shapes = sharding.unbox(boxed)
    params, gradients = jax.tree.map(lambda x: draw(x, 1), shapes), jax.tree.map(lambda x: 0.01 * draw(x, 2), shapes)
    return params, gradients, sharding.logical_axes(boxed)


def test_adaptive_clipping_is_the_papers_unit_by_unit(parameters: Any) -> None:
    """Against loops over units in float64 (arXiv 2102.06171, equation 3)."""
    params, gradients, axes = parameters
    config = adaptive_clipping("")
    config.pattern, config.eps = ".*", 0.5  # an ε that some units fall below
    got, _ = jax.jit(optimizer.adaptive_clip(config, axes).update)(gradients, optax.EmptyState(), params)
    flat = {name: traverse_util.flatten_dict(tree, sep="/") for name, tree in
            (("got", got), ("params", params), ("gradients", gradients))}  # fmt: skip
    clipped = kept = 0
    for path, dimensions in UNITS.items():
        g, p = (np.array(flat[name][path], np.float64) for name in ("gradients", "params"))
        expected = g.copy()
        for unit in np.ndindex(*(g.shape[i] for i in dimensions)):
            index = tuple(unit[dimensions.index(i)] if i in dimensions else slice(None) for i in range(g.ndim))
            norm, largest = math.sqrt((g[index] ** 2).sum()), 0.01 * max(math.sqrt((p[index] ** 2).sum()), 0.5)
            if norm > largest:
                expected[index] = g[index] * largest / norm
            clipped, kept = clipped + (norm > largest), kept + (norm <= largest)
        np.testing.assert_allclose(flat["got"][path], expected, rtol=1e-5, err_msg=path)
    assert min(clipped, kept) > 100


def test_adaptive_clipping_is_optaxs_where_layouts_agree(parameters: Any) -> None:
    params, gradients, axes = parameters
    alike = [path for path, names in axes.items() if names[:1] != ("layers",)]
    flat: Any = (traverse_util.flatten_dict(tree, sep="/") for tree in (gradients, params))
    gradients, params = ({path: tree[path] for path in alike} for tree in flat)
    expected, _ = jax.jit(optax.adaptive_grad_clip(0.01, 1e-3).update)(gradients, optax.EmptyState(), params)
    transform = optimizer.adaptive_clip(adaptive_clipping(".*"), axes)
    got, _ = jax.jit(transform.update)(gradients, optax.EmptyState(), params)
    assert len(alike) > 30
    for path in alike:
        np.testing.assert_allclose(got[path], expected[path], rtol=1e-5, err_msg=path)


def test_what_the_pattern_does_not_name_is_clipped_by_its_own_norm(parameters: Any) -> None:
    params, gradients, axes = parameters
    config = clip_config("debug-NFNet").optimizer
    config.agc.pattern = "vision/(?!projection)"
    alone, _ = jax.jit(optimizer.adaptive_clip(config.agc, axes).update)(gradients, optax.EmptyState(), params)
    flat = traverse_util.flatten_dict(alone, sep="/")
    named = {path: g for path, g in flat.items() if re.match(config.agc.pattern, path)}
    for clip_norm in (1e9, 0.5):
        config.clip_norm = clip_norm
        transform = optax.chain(*optimizer.clipping(config, axes))
        got, _ = jax.jit(transform.update)(gradients, transform.init(params), params)
        got = traverse_util.flatten_dict(got, sep="/")
        rest = {path: g for path, g in traverse_util.flatten_dict(gradients, sep="/").items()
                if path == "vision/projection" or not path.startswith("vision/")}  # fmt: skip
        norm = math.sqrt(sum((np.float64(g) ** 2).sum() for g in rest.values()))
        for path, g in rest.items():
            if clip_norm > norm:
                np.testing.assert_array_equal(got[path], g)
            else:
                np.testing.assert_allclose(got[path], g * clip_norm / norm, rtol=1e-5)
        for path, g in named.items():
            np.testing.assert_array_equal(got[path], g)

    with pytest.raises(ConfigError, match=r"agc.pattern 'visoin/' names no parameter; the first is logit_scale"):
        config.agc.pattern = "visoin/"
        optimizer.make_optimizer(config, 10, axes)
