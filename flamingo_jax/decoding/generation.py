"""Generation: one compiled program for each shape of prompts, whatever their lengths (padded on the left).

Dimensions: B prompts of P slots, N new tokens, V vocabulary, extra tokens included.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import ConfigError
from clip_jax.models.layers import Array
from clip_jax.sharding import constrain
from flamingo_jax.decoding.beam import beam_search, filler
from flamingo_jax.decoding.cache import Batch, Cache, check_room, prefill, step
from flamingo_jax.decoding.sampling import Sampling, log_probability
from flamingo_jax.decoding.stopping import Decode, truncate
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.language_model import KeyValue


class Generated(NamedTuple):
    """What came after each prompt. After a row's end stands nothing but the first stop id (0 where there is none)."""

    tokens: Array  # [B, N] int32
    lengths: Array  # [B] int32: tokens up to the end, with the stop token
    scores: Array  # [B] float32: sums of log-probabilities; of beams, divided by length^length_penalty


class Progress(NamedTuple):
    """The loop's state."""

    cache: Cache  # without each row's newest token; and without images, which no step changes
    tokens: Array  # [B, N] int32
    lengths: Array  # [B]
    scores: Array  # [B]
    done: Array  # [B] bool
    key: Array
    chosen: Array  # how many tokens


def generate(
    model: Flamingo,
    variables: Any,
    batch: Batch,
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: Array | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Decode | None = None,
    on_tokens: Callable[[np.ndarray], Any] | None = None,
) -> Generated:
    """Continues the prompts of a batch (see `Flamingo`), padded on the left: greedily, by drawing, or with beams.

    Runs on the mesh in use, caches sharded; may be called inside jit, but for `stop_strings` and `on_tokens`.

    Args:
      variables: the model's; fastest as `flamingo_jax.decoding.unstack` makes them.
      max_new_tokens: N.
      num_beams: more than 1: beam search, the best text of which is returned.
      length_penalty: beams' scores are divided by length^penalty.
      temperature, top_k, top_p: see `Sampling`; above temperature 0 tokens are drawn, and a `key` is needed.
      stop_ids: tokens that end a row.
      stop_strings: texts that end a row; found by `decode`, which gives the text of token ids. The row's tokens are
        kept up to the one that completes the string: cut its text with `flamingo_jax.decoding.truncate`.
      on_tokens: called with each step's tokens [B, 1] as they come; -1 for rows that have ended.

    Raises ConfigError for shapes, values or combinations that do not fit.
    """
    check_batch(model, batch)
    if max_new_tokens < 1 or num_beams < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens}, num_beams {num_beams}: expected at least 1 of each")
    if num_beams > 1 and (temperature > 0 or stop_strings or on_tokens):
        raise ConfigError("num_beams above 1: expected neither a temperature, nor stop_strings, nor on_tokens")
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, key=key, stop_ids=stop_ids,
        stop_strings=stop_strings, decode=decode, on_tokens=on_tokens,
    )  # fmt: skip
    _check_options(**options)
    logits, cache = read_prompts(model, variables, batch, max_new_tokens - 1)
    if num_beams > 1:
        fixed, stops = (model, sharding_rules(), max_new_tokens, num_beams), np.array(stop_ids, np.int32)
        return Generated(*_beams(*fixed, variables, logits, cache, length_penalty, stops))
    return resume(model, variables, logits, cache, **options)[0]


def resume(
    model: Flamingo,
    variables: Any,
    logits: Array,
    cache: Cache,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    key: Array | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Decode | None = None,
    on_tokens: Callable[[np.ndarray], Any] | None = None,
) -> tuple[Generated, Cache]:
    """`generate` from a cache and the logits of the next token, such as `read_prompts` or `extend` gave.

    Returns what was said, and the cache of all of it but the newest token of each row, after which rows that ended
    early have padding; read those tokens first to go on (`extend`, which says when padding matters). Of the cache that
    is given, the memory of the text's keys and values is taken over; it needs room for max_new_tokens - 1.
    """
    sampling = _check_options(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, key=key, stop_ids=stop_ids,
        stop_strings=stop_strings, decode=decode, on_tokens=on_tokens,
    )  # fmt: skip
    check_room(cache, max_new_tokens - 1)
    fixed, stops = (model, sharding_rules(), max_new_tokens), np.array(stop_ids, np.int32)
    key = jax.random.key(0) if key is None else key
    progress = _begin(max_new_tokens, sampling, logits, cache._replace(text=(), media=()), stops, key)
    progress = progress._replace(cache=progress.cache._replace(text=cache.text))

    def advance(progress: Progress, more: int) -> Progress:
        return _advance(*fixed, sampling, variables, cache.media, progress, stops, more)

    if not stop_strings and on_tokens is None:
        progress = advance(progress, max_new_tokens)
        return _outcome(progress, cache.media)

    def holds_a_stop_string(ids: list[int]) -> bool:
        return decode is not None and (text := decode(ids)) != truncate(text, stop_strings)

    for count in range(1, max_new_tokens + 1):
        if count > 1:
            progress = advance(progress, 1)
        tokens, alive = np.asarray(progress.tokens)[:, :count], np.asarray(progress.lengths) == count
        if on_tokens is not None:
            on_tokens(np.where(alive, tokens[:, -1], -1)[:, None])
        ended = [bool(a) and holds_a_stop_string(row) for a, row in zip(alive, tokens.tolist(), strict=True)]
        progress = progress._replace(done=progress.done | np.array(ended))
        if np.asarray(progress.done).all():
            break
    return _outcome(progress, cache.media)


def _outcome(progress: Progress, media: tuple[KeyValue, ...]) -> tuple[Generated, Cache]:
    return Generated(progress.tokens, progress.lengths, progress.scores), progress.cache._replace(media=media)


def _check_options(
    *, max_new_tokens: int, temperature: float, top_k: int, top_p: float, key: Array | None,
    stop_strings: Sequence[str], decode: Decode | None, **_: Any,
) -> Sampling:  # fmt: skip
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens}: expected at least 1")
    if temperature > 0 and key is None:
        raise ConfigError(f"temperature {temperature} draws tokens: expected a key")
    if stop_strings and decode is None:
        raise ConfigError("stop_strings are found in text: expected a function `decode`")
    return Sampling(temperature, top_k, top_p)


def check_batch(model: Flamingo, batch: Batch) -> None:
    """Raises ConfigError for prompts that do not fit together or the model, or end in padding (outside jit only)."""
    V = model.language_model.vocab_size + model.extra_tokens
    B, P = batch["text"].shape
    images = "features" if "features" in batch else "media"
    T, F = batch[images].shape[1:3]
    expected = {"text_mask": (B, P), "media_mask": (B, P, T), "frame_mask": (B, T, F)}
    for name, shape in expected.items():
        if batch[name].shape != shape:
            raise ConfigError(
                f"{name} has shape {list(batch[name].shape)}; text {[B, P]} and {images} "
                f"{list(batch[images].shape)} need {list(shape)}"
            )
    text, mask = batch["text"], batch["text_mask"]
    if isinstance(text, np.ndarray) and isinstance(mask, np.ndarray):
        if not mask[:, -1].all():
            row = int(np.argmin(mask[:, -1]))
            raise ConfigError(f"prompt {row} ends in padding: expected padding on the left")
        if text.min() < 0 or text.max() >= V:
            raise ConfigError(f"token ids from {text.min()} to {text.max()}: this model has ids from 0 to {V - 1}")


def read_prompts(model: Flamingo, variables: Any, batch: Batch, room: int) -> tuple[Array, Cache]:
    """`prefill`, compiled: the same program for whatever is done next."""
    return _prefill(model, sharding_rules(), room, variables, dict(batch))


def sharding_rules() -> tuple[Any, ...]:
    """An argument of every compiled function: jit does not know them to be part of its key."""
    return tuple(nn.get_logical_axis_rules())


@partial(jax.jit, static_argnums=(0, 1, 2))
def _prefill(model: Flamingo, rules: Any, room: int, variables: Any, batch: Batch) -> tuple[Array, Cache]:
    return prefill(model, variables, batch, room)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _beams(
    model: Flamingo, rules: Any, new_tokens: int, beams: int,
    variables: Any, logits: Array, cache: Cache, length_penalty: float | Array, stop_ids: Array,
) -> tuple[Array, Array, Array]:  # fmt: skip
    return beam_search(model, variables, logits, cache, new_tokens, beams, length_penalty, stop_ids)


@partial(jax.jit, static_argnums=(0, 1))
def _begin(new_tokens: int, sampling: Sampling, logits: Array, cache: Cache, stop_ids: Array, key: Array) -> Progress:
    """With the first token. The loop takes over the memory of what is made here, so no array is the cache's own."""
    B = len(logits)
    progress = Progress(
        cache=jax.tree.map(jnp.copy, cache),
        tokens=jnp.full((B, new_tokens), filler(stop_ids), jnp.int32),
        lengths=jnp.zeros(B, jnp.int32),
        scores=jnp.zeros(B, logits.dtype),
        done=jnp.zeros(B, bool),
        key=key,
        chosen=jnp.int32(0),
    )
    return _record(progress, logits, stop_ids, sampling)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=(6,))
def _advance(
    model: Flamingo, rules: Any, new_tokens: int, sampling: Sampling,
    variables: Any, media: tuple[KeyValue, ...], progress: Progress, stop_ids: Array, more: int | Array,
) -> Progress:  # fmt: skip
    """Up to `more` further tokens: fewer where all rows end or N are there."""
    end = jnp.minimum(progress.chosen + more, new_tokens)

    def body(progress: Progress) -> Progress:
        token = jnp.take(progress.tokens, progress.chosen - 1, axis=1)
        logits, cache = step(model, variables, progress.cache._replace(media=media), token, ~progress.done)
        return _record(progress._replace(cache=cache._replace(media=())), logits, stop_ids, sampling)

    return jax.lax.while_loop(lambda p: (p.chosen < end) & ~p.done.all(), body, progress)


def _record(progress: Progress, logits: Array, stop_ids: Array, sampling: Sampling) -> Progress:
    key, draw = jax.random.split(progress.key)
    token = sampling.choose(logits, draw)
    alive = ~progress.done
    found = progress._replace(
        tokens=progress.tokens.at[:, progress.chosen].set(jnp.where(alive, token, filler(stop_ids))),
        lengths=progress.lengths + alive,
        scores=progress.scores + jnp.where(alive, log_probability(logits, token), 0),
        done=progress.done | jnp.isin(token, stop_ids),
        key=key,
        chosen=progress.chosen + 1,
    )
    # What the host reads between steps, every process holds whole.
    tokens, lengths, scores, done = (constrain(x, ()) for x in (found.tokens, found.lengths, found.scores, found.done))
    return found._replace(tokens=tokens, lengths=lengths, scores=scores, done=done)
