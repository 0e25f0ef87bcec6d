"""The log-likelihood of given continuations. B prompts, N continuations of up to C tokens each."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import ConfigError
from clip_jax.models.layers import Array
from flamingo_jax.decoding.cache import Batch, Cache, extend, repeat
from flamingo_jax.decoding.generation import check_batch, read_prompts, sharding_rules
from flamingo_jax.decoding.sampling import log_probability
from flamingo_jax.models.flamingo import Flamingo


def pad_continuations(continuations: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of any lengths → (ids [N, C] padded on the right, mask [N, C]), as `score` takes them.

    Raises ConfigError for an empty one.
    """
    if not continuations or not all(len(ids) for ids in continuations):
        raise ConfigError("continuations to score: expected at least one, and a token in each")
    C = max(len(ids) for ids in continuations)
    mask = np.arange(C) < np.array([len(ids) for ids in continuations])[:, None]
    text = np.zeros(mask.shape, np.int32)
    text[mask] = np.concatenate([np.asarray(ids) for ids in continuations])
    return text, mask


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids they begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def score(
    model: Flamingo, variables: Any, batch: Batch, continuations: Array | np.ndarray, mask: Array | np.ndarray,
    *, at_once: int = 16,
) -> Array:  # fmt: skip
    """log p(continuation | prompt), natural: the sum over its tokens. [B, N] float32.

    Prompts are read once and images seen once. Divide by `mask.sum(-1)` for the mean of a token.

    Args:
      batch: prompts padded on the left, as for `generate`.
      continuations, mask: [N, C], the same for all prompts, or [B, N, C]; padded on the right.
      at_once: how many continuations of each prompt are read together; they share no memory but the images'.

    Raises ConfigError for shapes that do not fit.
    """
    check_batch(model, batch)
    B = batch["text"].shape[0]
    shape = continuations.shape
    if shape != mask.shape or len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != B) or 0 in shape:
        raise ConfigError(
            f"continuations of shape {list(shape)} and mask {list(mask.shape)}: expected [N, C] or [{B}, N, C]"
        )
    text, known = (jnp.broadcast_to(x, (B, *shape[-2:])) for x in (continuations, mask))
    logits, cache = read_prompts(model, variables, batch, shape[-1] - 1)
    return _score(model, sharding_rules(), min(at_once, shape[-2]), variables, logits, cache, text, known)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _score(
    model: Flamingo, rules: Any, n: int, variables: Any, logits: Array, cache: Cache, text_BxNxC: Array,
    mask_BxNxC: Array,
) -> Array:  # fmt: skip
    B, N, C = text_BxNxC.shape
    cache = repeat(cache, n)

    def some(these: tuple[Array, Array]) -> Array:
        """Of n continuations of each prompt, [B·n, C]."""
        text, mask = these
        first = log_probability(jnp.repeat(logits, n, axis=0), text[:, 0])[:, None]
        if C == 1:
            return (first * mask).sum(axis=1)
        after, _ = extend(model, variables, cache, text[:, :-1], mask[:, :-1])
        each = jnp.concatenate([first, log_probability(after, text[:, 1:])], axis=1)
        return (each * mask).sum(axis=1)

    def parts(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), (0, -N % n), (0, 0))).reshape(B, -1, n, C)
        return padded.swapaxes(0, 1).reshape(-1, B * n, C)

    found = jax.lax.map(some, (parts(text_BxNxC), parts(mask_BxNxC.astype(bool))))
    return found.reshape(-1, B, n).swapaxes(0, 1).reshape(B, -1)[:, :N]
