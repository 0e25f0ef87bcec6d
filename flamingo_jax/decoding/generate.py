"""Generation with key/value caches: one compiled program for each shape of prompts. Dimension letters: see
`flamingo_jax/models/layers.py`; P is the prompts' length, S = P + the number of new tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax.models.layers import Array
from flamingo_jax.models.flamingo import Flamingo
from flamingo_jax.models.language_model import causal_mask, positions


def make_generate(model: Flamingo, new_tokens: int, stop_id: int) -> Callable[[Any, Mapping[str, Array]], Array]:
    """A function (variables, batch) → the most likely continuation [B, new_tokens] int32, token by token.

    Prompts in the batch (see `Flamingo`) are padded on the left. After the first `stop_id` comes nothing but
    `stop_id`; the loop ends when every row has met one. To be jitted.
    """

    def generate(variables: Any, batch: Mapping[str, Array]) -> Array:
        text_mask, media_mask = batch["text_mask"], batch["media_mask"]
        B, P = text_mask.shape
        S = P + new_tokens
        lm = model.language_model

        def run(*arguments: Any, method: str) -> Any:
            return model.apply(variables, *arguments, method=method)

        # Images are seen once: every gated block's keys and values are kept.
        media = run(run(batch["media"], batch["frame_mask"], method="see"), method="keys_values")
        shape = (lm.layers, B, S, lm.kv_heads, lm.width // lm.heads)
        cache = (jnp.zeros(shape, lm.dtype), jnp.zeros(shape, lm.dtype))
        seen = jnp.pad(causal_mask(text_mask), ((0, 0), (0, 0), (0, new_tokens)))
        x, cache = run(
            run(batch["text"], method="embed"), positions(text_mask), seen, media, media_mask, cache, 0, method="read"
        )
        length, last_media = text_mask.sum(axis=1), media_mask[:, -1:]

        def choose(x_Bx1xD: Array) -> Array:
            return jnp.argmax(run(x_Bx1xD, method="logits")[:, 0], axis=-1).astype(jnp.int32)

        def more(loop: tuple[Any, ...]) -> Array:
            i, done = loop[0], loop[3]
            return (i < new_tokens) & ~done.all()

        def step(loop: tuple[Any, ...]) -> tuple[Any, ...]:
            i, tokens, token, done, cache = loop
            token = jnp.where(done, stop_id, token)
            tokens = tokens.at[:, i].set(token)
            done = done | (token == stop_id)
            # New tokens stand at P, P + 1, … of the cache, whatever the padding before them.
            slots = jnp.arange(S)
            seen = jnp.where(slots < P, jnp.pad(text_mask, ((0, 0), (0, new_tokens))), slots <= P + i)
            x, cache = run(
                run(token[:, None], method="embed"), (length + i)[:, None], seen[:, None], media, last_media,
                cache, P + i, method="read",
            )  # fmt: skip
            return i + 1, tokens, choose(x), done, cache

        start = (0, jnp.full((B, new_tokens), stop_id, jnp.int32), choose(x[:, -1:]), jnp.zeros(B, bool), cache)
        return jax.lax.while_loop(more, step, start)[1]

    return generate
