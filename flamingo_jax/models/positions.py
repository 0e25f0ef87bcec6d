"""How a decoder knows where a token stands. Dimension letters: see `layers.py`; T distances."""

import math
from typing import Any

import jax.numpy as jnp

from clip_jax.models.layers import Array

ALIBI_MAX = 8  # the steepest head's slope is 2^(-8 / heads), the flattest one's 2^-8


def rotary(x_BxLxHxK: Array, position_BxL: Array, theta: float, size: int) -> Array:
    """Rotates the pairs (i, i + size/2) by position · theta^(-2i/size), as LLaMA in Hugging Face's layout does.

    The rest of each head, beyond `size`, stays (GPT-NeoX).
    """
    turning, rest = x_BxLxHxK[..., :size], x_BxLxHxK[..., size:]
    half = size // 2
    wide = jnp.promote_types(x_BxLxHxK.dtype, jnp.float32)
    frequency = theta ** (-jnp.arange(half, dtype=wide) / half)
    angle = position_BxL[..., None, None].astype(wide) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(turning.astype(wide), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BxLxHxK.dtype), rest], axis=-1)


def alibi(heads: int, distance_LxS: Array, dtype: Any) -> Array:
    """What is added to the logits (arXiv 2108.12409): the distance times each head's slope. [H, L, S].

    For a number of heads that is no power of two: the next power's slopes, every second one first, as in MPT.
    """
    power = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-ALIBI_MAX * (i + 1) / power) for i in range(power)]
    if power != heads:
        slopes = (slopes[1::2] + slopes[::2])[:heads]
    return -jnp.array(slopes, dtype)[:, None, None] * distance_LxS.astype(dtype)


def sinusoids(distance_T: Array, width: int) -> Array:
    """The encoding R of distances (arXiv 1901.02860 §3.3): sines, then cosines, of geometric wavelengths. [T, D]."""
    angle_TxF = distance_T[:, None].astype(jnp.float32) * 10000.0 ** (-jnp.arange(0, width, 2) / width)
    return jnp.concatenate([jnp.sin(angle_TxF), jnp.cos(angle_TxF)], axis=-1)


def relative_logits(query_BxLxJxGxK: Array, encoding_TxJxGxK: Array, keys: int, dtype: Any) -> Array:
    """A query times the encoding of its distance to each key (arXiv 1901.02860, appendix B). [B, J, G, L, S].

    `encoding` holds T = L + S distances in falling order: column 1 is the last query's to key 0, and query i's are
    those from column L - i on. Read with rows one column shorter, all of them stand below each other: no gather.
    """
    L, S = query_BxLxJxGxK.shape[1], keys
    every = jnp.einsum("BLJGK,TJGK->BJGLT", query_BxLxJxGxK, encoding_TxJxGxK, preferred_element_type=dtype)
    flat = every.reshape(*every.shape[:3], L * (L + S))[..., L:]
    return flat.reshape(*every.shape[:3], L, L + S - 1)[..., :S]
