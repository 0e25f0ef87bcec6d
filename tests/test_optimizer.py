"""The optimiser: what decays, what is clamped, and AdamW by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax import sharding
from clip_jax.models.variants import build_two_tower, get_variant
from clip_jax.training import optimizer
from configs.clip.common import clip_config


def test_decay_skips_biases_gains_and_the_temperature_however_they_are_stacked() -> None:
    for name in ("debug-ViT", "debug-RN"):
        model = build_two_tower(get_variant(name))
        batch = {"image": jnp.zeros((1, 32, 32, 3)), "text": jnp.zeros((1, 12), jnp.int32)}
        params = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0), batch))["params"]
        leaves = jax.tree_util.tree_leaves_with_path(optimizer.decay_mask(params))
        mask = {optimizer.path_string(path): decays for path, decays in leaves}
        for path, decays in mask.items():
            last = path.split("/")[-1]
            assert decays == (last not in ("bias", "scale", "logit_scale", "class_embedding")), path
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
