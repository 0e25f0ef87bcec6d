"""What decoding keeps between tokens, as a value, and the pure functions that make and lengthen it.

Dimension letters: see `flamingo_jax/models/layers.py`; P the prompts' length, S the slots of a row (P + room), and
Q = B·n rows of text: n at a time go on from one of B prompts and share its images.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import ConfigError
from clip_jax.models.layers import Array
from clip_jax.sharding import constrain
from flamingo_jax.models.flamingo import Flamingo, layer
from flamingo_jax.models.language_model import KeyValue, causal_mask, positions

Variables = Any
Batch = Mapping[str, Any]  # arrays of jax or numpy: see `Flamingo`


class Cache(NamedTuple):
    """What has been read of Q texts; sharded over rows and heads inside `clip_jax.sharding.use_mesh`.

    Slots are places in a row, padding included; all rows fill them alike. Those from `start` on are free.
    """

    text: tuple[KeyValue, ...]  # keys and values [Q, J, S, K] of every block's self-attention
    media: tuple[KeyValue, ...]  # keys and values [B, H, T·R, K] of every gated block: computed once a prompt
    text_mask: Array  # [Q, S]: slots that hold a token
    media_mask: Array  # [Q, T]: images (see `Flamingo.image_mask`) that the last token attends, and the next one will
    length: Array  # [Q] int32: tokens so far, which are the next one's position
    start: Array  # int32: the next free slot

    @property
    def slots(self) -> int:
        return self.text_mask.shape[1]


def unstack(variables: Variables) -> Variables:
    """The same variables with the stacked parameters of blocks as tuples, one tree for each block.

    All functions here take either. From stacked parameters, which training wants, every call first copies those of
    each block; so decode with these, and let the stacked ones go.
    """
    params = variables["params"]

    def split(stacked: Any) -> tuple[Any, ...]:
        return tuple(layer(stacked, i) for i in range(len(jax.tree.leaves(stacked)[0])))

    lm = params["language_model"]
    lm = {**lm, "blocks": split(lm["blocks"])}
    more = {name: split(params[name]) for name in ("gated", "grafted") if name in params}
    return {**variables, "params": {**params, **more, "language_model": lm}}


def prefill(model: Flamingo, variables: Variables, batch: Batch, room: int) -> tuple[Array, Cache]:
    """Reads prompts padded on the left (a batch as `Flamingo` takes it), with `room` slots for what follows.

    Returns: (logits of the next token [B, V + E], the cache).
    """
    text_mask = batch["text_mask"].astype(bool)
    media_mask = model.image_mask(batch["media_mask"].astype(bool), batch["frame_mask"].astype(bool))
    P = text_mask.shape[1]
    media = _look(model, variables, batch)
    x = model.apply(variables, batch["text"], method="embed")
    x, text = model.apply(
        variables, x, positions(text_mask), causal_mask(text_mask), media, media_mask, None, 0, P + room,
        method="read_cached",
    )  # fmt: skip
    logits = model.apply(variables, x[:, -1:], method="logits")[:, 0]
    more = ((0, 0), (0, 0), (0, room), (0, 0))
    cache = Cache(
        text=jax.tree.map(lambda x: jnp.pad(x, more), text),
        media=media,
        text_mask=jnp.pad(text_mask, ((0, 0), (0, room))),
        media_mask=media_mask[:, -1],
        length=text_mask.sum(axis=1, dtype=jnp.int32),
        start=jnp.int32(P),
    )
    return logits, _place(cache)


def extend(
    model: Flamingo, variables: Variables, cache: Cache, text_QxL: Array | np.ndarray,
    text_mask_QxL: Array | np.ndarray, media_mask_QxLxT: Array | np.ndarray | None = None,
) -> tuple[Array, Cache]:  # fmt: skip
    """Reads L more tokens of every row at once: (logits [Q, L, V + E], the longer cache).

    Padding may stand anywhere. But where positions are relative or ALiBi they count slots: what follows a shorter
    row's padding then stands too far away. Without a `media_mask` (see `Flamingo.image_mask`) tokens attend the images
    that the last one did.

    Raises ConfigError where the cache has no room left, and (not inside jit) where fewer than L slots are free.
    """
    L, S = text_QxL.shape[1], cache.slots
    check_room(cache, L)
    text, text_mask = jnp.asarray(text_QxL), jnp.asarray(text_mask_QxL, bool)
    if media_mask_QxLxT is None:
        media_mask = jnp.broadcast_to(cache.media_mask[:, None], (*text_mask.shape, cache.media_mask.shape[1]))
    else:
        media_mask = jnp.asarray(media_mask_QxLxT, bool)
    filled = jax.lax.dynamic_update_slice_in_dim(cache.text_mask, text_mask, cache.start, axis=1)
    seen = filled[:, None] & (jnp.arange(S) <= cache.start + jnp.arange(L)[:, None])
    count = jnp.cumsum(text_mask, axis=1, dtype=jnp.int32)
    position = cache.length[:, None] + jnp.maximum(count - 1, 0)
    x = model.apply(variables, text, method="embed")
    x, kept = model.apply(
        variables, x, position, seen, cache.media, media_mask, cache.text, cache.start, S,
        method="read_cached",
    )  # fmt: skip
    logits = model.apply(variables, x, method="logits")
    last = jnp.where(text_mask, jnp.arange(L), -1).max(axis=1)  # -1: padding only
    attended = jnp.take_along_axis(media_mask, jnp.maximum(last, 0)[:, None, None], axis=1)[:, 0]
    cache = cache._replace(
        text=kept,
        text_mask=filled,
        media_mask=jnp.where(last[:, None] < 0, cache.media_mask, attended),
        length=cache.length + count[:, -1],
        start=cache.start + L,
    )
    return logits, _place(cache)


def check_room(cache: Cache, tokens: int) -> None:
    """Raises ConfigError where so many do not fit in; inside jit, where they never could."""
    taken = 0 if isinstance(cache.start, jax.core.Tracer) else int(cache.start)
    if taken + tokens > cache.slots:
        raise ConfigError(
            f"{tokens} more tokens: the cache has {cache.slots} slots, of which {taken} are taken; see `grow`"
        )


def step(
    model: Flamingo, variables: Variables, cache: Cache, token_Q: Array | np.ndarray,
    alive_Q: Array | np.ndarray | None = None,
) -> tuple[Array, Cache]:  # fmt: skip
    """Reads one more token of every row: (logits of the next one [Q, V + E], the longer cache).

    Rows that are not `alive` read padding instead: their logits say nothing.
    """
    text = token_Q[:, None]
    mask = jnp.ones(text.shape, bool) if alive_Q is None else jnp.asarray(alive_Q, bool)[:, None]
    logits, cache = extend(model, variables, cache, text, mask)
    return logits[:, 0], cache


def add_media(
    model: Flamingo,
    variables: Variables,
    cache: Cache,
    media_BxTxFxSxSx3: Array | np.ndarray,
    frame_mask_BxTxF: Array | np.ndarray,
) -> Cache:
    """The cache with more images after those that it has, which no token attends yet: the next turn of a chat."""
    more = _look(model, variables, {"media": media_BxTxFxSxSx3, "frame_mask": frame_mask_BxTxF})
    joined = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=2), cache.media, more)
    T, F = frame_mask_BxTxF.shape[1:]
    unseen = ((0, 0), (0, T if model.resampler.has_latents else T * F))
    return _place(cache._replace(media=joined, media_mask=jnp.pad(cache.media_mask, unseen)))


def grow(cache: Cache, room: int) -> Cache:
    """The cache with `room` more slots."""
    text = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0))), cache.text)
    return _place(cache._replace(text=text, text_mask=jnp.pad(cache.text_mask, ((0, 0), (0, room)))))


def repeat(cache: Cache, times: int) -> Cache:
    """Every row `times` times, one after the other: so many texts may follow each prompt. Images are not copied."""
    text, text_mask, media_mask, length = jax.tree.map(
        lambda x: jnp.repeat(x, times, axis=0), (cache.text, cache.text_mask, cache.media_mask, cache.length)
    )
    return _place(cache._replace(text=text, text_mask=text_mask, media_mask=media_mask, length=length))


def reorder(cache: Cache, row_BxN: Array) -> Cache:
    """Of each prompt's N rows those that `row` names (0 to N - 1), which must have as many tokens and images."""
    B, N = row_BxN.shape

    def take(x: Array) -> Array:
        return jax.vmap(lambda rows, row: rows[row])(x.reshape(B, N, *x.shape[1:]), row_BxN).reshape(x.shape)

    return _place(cache._replace(text=jax.tree.map(take, cache.text)))


def _look(model: Flamingo, variables: Variables, batch: Batch) -> tuple[KeyValue, ...]:
    tokens = model.apply(variables, batch, method="see")
    return model.apply(variables, tokens, method="keys_values")


def _place(cache: Cache) -> Cache:
    """Keys and values over rows and heads; the rest over rows."""

    def place(head_axis: str, pairs: tuple[KeyValue, ...]) -> tuple[KeyValue, ...]:
        return jax.tree.map(lambda x: constrain(x, ("batch", head_axis, "length", "head_size")), pairs)

    return Cache(
        text=place("kv_heads", cache.text),
        media=place("heads", cache.media),
        text_mask=constrain(cache.text_mask, ("batch", "length")),
        media_mask=constrain(cache.media_mask, ("batch", None)),
        length=constrain(cache.length, ("batch",)),
        start=constrain(cache.start, ()),
    )
