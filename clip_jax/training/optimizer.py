"""AdamW as CLIP uses it: linear warm-up, cosine decay, decay masks, clipping, a bounded temperature."""

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from clip_jax.errors import ConfigError

PyTree = Any

# Weight decay skips gains, biases, gates and the temperature. Told by name: with heads split and layers stacked,
# a bias is not a vector any more.
NO_DECAY = r"(^|/)(bias|scale|class_embedding|logit_scale|logit_bias|attention_gate|mlp_gate)$"


def path_string(path: tuple[Any, ...]) -> str:
    """ "vision/transformer/…" from a tree path; attributes (a box's `.value`) are no part of the name."""
    return "/".join(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))


def decay_mask(params: PyTree, no_decay: str = "") -> PyTree:
    """True where weight decay applies. `no_decay`: a pattern for the start of further paths that it skips."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = path_string(path)
        return not re.search(NO_DECAY, name) and not (no_decay and re.match(no_decay, name))

    return jax.tree_util.tree_map_with_path(decays, params)


def learning_rate(config: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Linear from 0 to `lr` in `warmup_steps`, then a cosine to 0 at the last step, or constant.

    Raises ConfigError for another `decay`.
    """
    if config.decay == "constant":
        return optax.warmup_constant_schedule(0.0, config.lr, config.warmup_steps)
    if config.decay != "cosine":
        raise ConfigError(f"optimizer.decay {config.decay!r}: expected cosine or constant")
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, config.warmup_steps, max(steps, config.warmup_steps + 1))


def clamp_logit_scale(maximum: float) -> optax.GradientTransformation:
    """Changes the update of `logit_scale` (the logarithm) so that it ends in [0, ln maximum], as OpenAI's does."""
    top = math.log(maximum)

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree = None) -> tuple[PyTree, optax.EmptyState]:
        def clamp(path: tuple[Any, ...], u: jax.Array, p: jax.Array) -> jax.Array:
            return jnp.clip(p + u, 0.0, top) - p if path_string(path).endswith("logit_scale") else u

        return jax.tree_util.tree_map_with_path(clamp, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def scale_by_pattern(factors: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies the updates of the parameters whose path's start matches a pattern; the first one that does counts."""

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree = None) -> tuple[PyTree, optax.EmptyState]:
        def scale(path: tuple[Any, ...], u: jax.Array) -> jax.Array:
            name = path_string(path)
            return next((u * factor for pattern, factor in factors if re.match(pattern, name)), u)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def make_optimizer(config: ml_collections.ConfigDict, steps: int) -> optax.GradientTransformation:
    """The chain: clip by the global norm, Adam, decoupled decay, learning rate (by pattern), bounded temperature."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=partial(decay_mask, no_decay=config.no_decay)),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        scale_by_pattern(config.lr_factors),
        clamp_logit_scale(config.max_logit_scale),
    )
