"""Text from a Flamingo: generation and scoring, and the explicit cache that both stand on."""

from flamingo_jax.decoding.cache import Cache, add_media, extend, grow, prefill, repeat, step, unstack
from flamingo_jax.decoding.generation import Generated, generate, read_prompts, resume
from flamingo_jax.decoding.scoring import pad_continuations, score
from flamingo_jax.decoding.stopping import truncate

__all__ = [
    "Cache",
    "Generated",
    "add_media",
    "extend",
    "generate",
    "grow",
    "pad_continuations",
    "prefill",
    "read_prompts",
    "repeat",
    "resume",
    "score",
    "step",
    "truncate",
    "unstack",
]
