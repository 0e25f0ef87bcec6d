"""Beam search as transformers has it (generation/utils.py, `_beam_search` with early_stopping=False).

Dimensions: B prompts, W beams, N new tokens, V vocabulary, extra tokens included, C candidates of a step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clip_jax.models.layers import Array
from flamingo_jax.decoding.cache import Cache, reorder, repeat, step
from flamingo_jax.models.flamingo import Flamingo

NEVER = -1e9  # a score that nothing reaches, as transformers spells it


class Beams(NamedTuple):
    """Of each prompt, the W texts that go on and the W best that have ended."""

    running: Array  # [B, W, N] int32
    running_score: Array  # [B, W]: log-probabilities
    ended: Array  # [B, W, N]
    ended_length: Array  # [B, W]
    ended_score: Array  # [B, W]: log-probabilities / length^penalty, in falling order
    has_ended: Array  # [B, W]: of those slots, which hold a text
    may_improve: Array  # [B]: whether a running text could still beat an ended one
    parent: Array  # [B, W]: which beam each running text went on from
    chosen: Array  # how many tokens


def filler(stop_ids: Array) -> Array | int:
    """What stands after the end of a text."""
    return stop_ids[0] if len(stop_ids) else 0


def beam_search(
    model: Flamingo, variables: Any, logits_BxV: Array, cache: Cache, new_tokens: int, beams: int,
    length_penalty: float | Array, stop_ids: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The best text after each prompt, of which `prefill` gave logits and cache: (tokens [B, N], their number [B],
    score [B]).

    The score is the sum of log-probabilities divided by length^`length_penalty`; a stop token counts. A prompt is
    left when its best running text scores, at its present length, below its worst ended one.
    """
    B, W, N = len(logits_BxV), beams, new_tokens
    cache = repeat(cache, W)
    media, cache = cache.media, cache._replace(media=())  # which no step changes
    start = Beams(
        running=jnp.full((B, W, N), filler(stop_ids), jnp.int32),
        running_score=jnp.full((B, W), NEVER).at[:, 0].set(0.0),  # at first all beams are one
        ended=jnp.full((B, W, N), filler(stop_ids), jnp.int32),
        ended_length=jnp.zeros((B, W), jnp.int32),
        ended_score=jnp.full((B, W), NEVER),
        has_ended=jnp.zeros((B, W), bool),
        may_improve=jnp.ones(B, bool),
        parent=jnp.zeros((B, W), jnp.int32),
        chosen=jnp.int32(0),
    )

    def choose(found: Beams, logits_QxV: Array) -> Beams:
        return _choose(found, logits_QxV.reshape(B, W, -1), length_penalty, stop_ids)

    def more(loop: tuple[Beams, Cache]) -> Array:
        return (loop[0].chosen < N) & loop[0].may_improve.any()

    def advance(loop: tuple[Beams, Cache]) -> tuple[Beams, Cache]:
        found, cache = loop
        token = jnp.take(found.running, found.chosen - 1, axis=2).reshape(B * W)
        cache = reorder(cache, found.parent)._replace(media=media)
        logits, cache = step(model, variables, cache, token)
        return choose(found, logits), cache._replace(media=())

    found = choose(start, jnp.repeat(logits_BxV, W, axis=0))
    found, _ = jax.lax.while_loop(more, advance, (found, cache))
    return found.ended[:, 0], found.ended_length[:, 0], found.ended_score[:, 0]


def _choose(beams: Beams, logits_BxWxV: Array, length_penalty: float | Array, stop_ids: Array) -> Beams:
    """One more token for every beam."""
    B, W, V = logits_BxWxV.shape
    N, i = beams.running.shape[-1], beams.chosen
    # So many candidates that W remain where all others have ended.
    C = max(2, 1 + len(stop_ids)) * W
    score = jax.nn.log_softmax(logits_BxWxV, axis=-1) + beams.running_score[..., None]
    score, at = jax.lax.top_k(score.reshape(B, W * V), min(C, W * V))
    parent, token = at // V, (at % V).astype(jnp.int32)
    text = _take(beams.running, parent).at[:, :, i].set(token)
    ends = jnp.isin(token, stop_ids) | (i + 1 == N)

    running_score, first = jax.lax.top_k(score + ends * NEVER, W)

    penalised = score / (i + 1).astype(score.dtype) ** length_penalty
    ends &= jnp.arange(ends.shape[1]) < W  # the others were only there to go on
    penalised += ~beams.may_improve[:, None] * NEVER + ~ends * NEVER
    ended_score, best = jax.lax.top_k(jnp.concatenate([beams.ended_score, penalised], axis=1), W)

    def merge(old: Array, new: Array) -> Array:
        return _take(jnp.concatenate([old, new], axis=1), best)

    has_ended = merge(beams.has_ended, ends)
    worst = jnp.where(has_ended, ended_score.min(axis=1, keepdims=True), NEVER)
    possible = running_score[:, :1] / (i + 1).astype(score.dtype) ** length_penalty
    return Beams(
        running=_take(text, first),
        running_score=running_score,
        ended=merge(beams.ended, text),
        ended_length=merge(beams.ended_length, jnp.broadcast_to(i + 1, ends.shape)),
        ended_score=ended_score,
        has_ended=has_ended,
        may_improve=beams.may_improve & (possible > worst).any(axis=1),
        parent=_take(parent, first),
        chosen=i + 1,
    )


def _take(x_BxCx: Array, index_BxW: Array) -> Array:
    return jax.vmap(lambda x, index: x[index])(x_BxCx, index_BxW)
