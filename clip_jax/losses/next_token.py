"""The loss of a language model. B batch, L text length, V vocabulary."""

import jax
import jax.numpy as jnp


def next_token_losses(logits_BxLxV: jax.Array, text_BxL: jax.Array) -> jax.Array:
    """-log p of each token but the first, given those before it, in nats. [B, L - 1], float32 or wider."""
    logits_BxLxV = logits_BxLxV[:, :-1].astype(jnp.promote_types(logits_BxLxV.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits_BxLxV, text_BxL[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxLxV, axis=-1) - chosen


def caption_losses(logits_BxLxV: jax.Array, text_BxL: jax.Array, end_id: int) -> tuple[jax.Array, jax.Array]:
    """(-log p of each whole caption, in nats; how many tokens that are). [B] each, float32 or wider.

    Predicted are the tokens after the first (the start token) up to and with the first end token.
    """
    losses_BxL = next_token_losses(logits_BxLxV, text_BxL)
    ended_BxL = jnp.cumsum(text_BxL == end_id, axis=1)[:, :-1] > 0  # before the token predicted
    counted_BxL = jnp.where(ended_BxL, 0, 1).astype(losses_BxL.dtype)
    return (losses_BxL * counted_BxL).sum(axis=1), counted_BxL.sum(axis=1)
