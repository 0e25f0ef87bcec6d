"""How a decoder knows where a token stands. Dimension letters: see `layers.py`; T distances."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from clip_jax.models.layers import Array

ALIBI_MAX = 8  # the steepest head's slope is 2^(-8 / heads), the flattest one's 2^-8


@dataclass(frozen=True)
class RopeScaling:
    """How a text longer than the pretraining's `original` positions is read: `kind` is "none", "linear" (every
    frequency divided by `factor`, arXiv 2306.15595), "llama3" (arXiv 2407.21783) or "yarn" (arXiv 2309.00071).

    Of the latter two, a frequency that turns more than `high` times within `original` stays, one that turns less
    than `low` times is divided, and those between are mixed. Cosines and sines are multiplied by `magnitude` (YaRN).
    """

    kind: str = "none"
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 1.0
    magnitude: float = 1.0


def frequencies(size: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Radians for each position, of each pair: theta^(-2i/size), scaled. float64 [size/2].

    "llama3" mixes in proportion to the turns, "yarn" in proportion to the pair's number, between the two pairs
    (rounded outwards) that turn `high` and `low` times: as in transformers, `modeling_rope_utils.py`.
    """
    pair = np.arange(size // 2)
    plain = theta ** (-2 * pair / size)
    if scaling.kind == "none":
        return plain
    kept = np.zeros(len(pair))  # the share of the frequency that is not divided
    if scaling.kind == "llama3":
        turns = scaling.original * plain / (2 * math.pi)
        kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    elif scaling.kind == "yarn":
        first, last = (
            size * math.log(scaling.original / (2 * math.pi * turns)) / (2 * math.log(theta))
            for turns in (scaling.high, scaling.low)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), size - 1)
        kept = 1 - np.clip((pair - first) / max(last - first, 1e-3), 0, 1)
    return plain * (kept + (1 - kept) / scaling.factor)


def rotary(x_BxLxHxK: Array, position_BxL: Array, frequency_F: np.ndarray, magnitude: float = 1.0) -> Array:
    """Rotates the pairs (i, i + F) by position · frequency, as LLaMA in Hugging Face's layout does.

    Angles, sines and cosines are float32 or wider. The rest of each head, beyond 2·F, stays (GPT-NeoX).
    """
    size = 2 * len(frequency_F)
    turning, rest = x_BxLxHxK[..., :size], x_BxLxHxK[..., size:]
    wide = jnp.promote_types(x_BxLxHxK.dtype, jnp.float32)
    angle = position_BxL[..., None, None].astype(wide) * jnp.asarray(frequency_F, wide)
    cos, sin = jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude
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
