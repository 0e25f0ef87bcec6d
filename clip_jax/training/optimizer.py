"""AdamW as CLIP uses it: linear warm-up, decay of the rate, decay masks, clipping, a bounded temperature."""

import math
import re
from collections.abc import Mapping, Sequence
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
NO_DECAY = r"(^|/)(bias|scale|gain|skip_gain|class_embedding|logit_scale|logit_bias|attention_gate|mlp_gate)$"


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
    """Linear from 0 to `lr` in `warmup_steps`, then a cosine or a line to 0 at the last step, or constant.

    Raises ConfigError for another `decay`.
    """
    up = optax.linear_schedule(0.0, config.lr, config.warmup_steps)  # of no steps: 0 for ever, so never alone
    if config.decay == "constant":
        return optax.join_schedules([up, optax.constant_schedule(config.lr)], [config.warmup_steps])
    end = max(steps, config.warmup_steps + 1)
    if config.decay == "linear":
        down = optax.linear_schedule(config.lr, 0.0, end - config.warmup_steps)
        return optax.join_schedules([up, down], [config.warmup_steps])
    if config.decay != "cosine":
        raise ConfigError(f"optimizer.decay {config.decay!r}: expected cosine, linear or constant")
    return optax.warmup_cosine_decay_schedule(0.0, config.lr, config.warmup_steps, end)


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


Axes = Mapping[str, tuple[str | None, ...]]  # a parameter's path → its logical axes


def unit_axes(path: str, axes: tuple[str | None, ...]) -> tuple[int, ...]:
    """The dimensions over which a parameter's norm is taken, for each of its units.

    A unit is what one output is computed with: a column of a matrix, a filter, of a stacked parameter each layer's
    own. A kernel that splits heads has two dimensions of outputs. A bias, a gain or a scalar is one unit.
    """
    start = 1 if axes[:1] == ("layers",) else 0
    if path.split("/")[-1] == "bias" or len(axes) - start < 2:
        return tuple(range(start, len(axes)))
    return tuple(range(start, len(axes) - (2 if axes[-1] == "head_size" else 1)))


def adaptive_clip(config: ml_collections.ConfigDict, axes: Axes) -> optax.GradientTransformation:
    """Shrinks each unit's gradient to a norm of at most `clipping`·max(‖unit‖, `eps`), where `pattern` names its path.

    (arXiv 2102.06171 §4.) `config`: `pattern`, for the start of a path, `clipping` and `eps`.
    """

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree = None) -> tuple[PyTree, optax.EmptyState]:
        def clip(path: tuple[Any, ...], g: jax.Array, p: jax.Array) -> jax.Array:
            name = path_string(path)
            if not re.match(config.pattern, name):
                return g
            over = unit_axes(name, axes[name])
            gradient, unit = (jnp.sqrt(jnp.square(x).sum(axis=over, keepdims=True)) for x in (g, p))
            largest = config.clipping * jnp.maximum(unit, config.eps)
            return g * jnp.minimum(1.0, largest / jnp.maximum(gradient, 1e-30)).astype(g.dtype)

        return jax.tree_util.tree_map_with_path(clip, updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def clipping(config: ml_collections.ConfigDict, axes: Axes) -> list[optax.GradientTransformation]:
    """What `agc.pattern` names is clipped adaptively; all the rest by its global norm.

    Raises ConfigError where the pattern names no parameter.
    """
    by_norm = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    pattern = config.agc.pattern
    if not pattern:
        return [by_norm]
    if not any(re.match(pattern, name) for name in axes):
        raise ConfigError(f"optimizer.agc.pattern {pattern!r} names no parameter; the first is {min(axes, default='')}")

    def rest(tree: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, _: not re.match(pattern, path_string(path)), tree)

    return [adaptive_clip(config.agc, axes), optax.masked(by_norm, rest)]


def make_optimizer(
    config: ml_collections.ConfigDict, steps: int, axes: Axes | None = None
) -> optax.GradientTransformation:
    """The chain: clip, Adam, decoupled decay, learning rate (by pattern), bounded temperature.

    `axes`: see `sharding.logical_axes`; adaptive clipping, which needs them, finds a parameter's units by them.
    """
    return optax.chain(
        *clipping(config, axes or {}),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=partial(decay_mask, no_decay=config.no_decay)),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        scale_by_pattern(config.lr_factors),
        clamp_logit_scale(config.max_logit_scale),
    )
