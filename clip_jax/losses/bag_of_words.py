"""Which words a text holds, in no order. B batch, L text length, V vocabulary."""

import jax
import jax.numpy as jnp


def bag_of_words_losses(logits_BxV: jax.Array, text_BxL: jax.Array, start_id: int | None, end_id: int) -> jax.Array:
    """-log p of a text's words, the mean over its distinct ones, in nats. [B], float32 or wider.

    p is a softmax over the vocabulary: a multi-class logistic loss, as in arXiv 1511.02251, here with the same
    weight for every text. Words are the ids between the
    start token and the first end token. A text without any has the loss 0.
    """
    logits_BxV = logits_BxV.astype(jnp.promote_types(logits_BxV.dtype, jnp.float32))
    is_word_BxL = jnp.cumsum(text_BxL == end_id, axis=1) == 0
    if start_id is not None:
        is_word_BxL &= jnp.arange(text_BxL.shape[1]) > 0
    earlier_LxL = jnp.tril(jnp.ones((text_BxL.shape[1],) * 2, bool), k=-1)
    same_BxLxL = (text_BxL[:, :, None] == text_BxL[:, None, :]) & is_word_BxL[:, None, :]
    counted_BxL = (is_word_BxL & ~(same_BxLxL & earlier_LxL).any(axis=2)).astype(logits_BxV.dtype)
    chosen_BxL = jnp.take_along_axis(logits_BxV, text_BxL, axis=1)
    losses_BxL = jax.nn.logsumexp(logits_BxV, axis=1, keepdims=True) - chosen_BxL
    return (losses_BxL * counted_BxL).sum(axis=1) / jnp.maximum(counted_BxL.sum(axis=1), 1)
