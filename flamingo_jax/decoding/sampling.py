"""How the next token is chosen from logits: the most likely one, or drawn. V vocabulary, extra tokens included."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.models.layers import Array


@dataclass(frozen=True)
class Sampling:
    """Logits are divided by `temperature`; then only the `top_k` largest stay (0: all), and of these the fewest whose
    probabilities sum to `top_p` or more (arXiv 1904.09751). Temperature 0: the most likely token.

    Raises ConfigError for values without a meaning.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: "
                "expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError("top_k and top_p draw tokens: expected a temperature above 0")

    def restrict(self, logits_BxV: Array) -> Array:
        """Logits of the distribution that is drawn from: -inf for what can't be."""
        logits = logits_BxV / self.temperature
        if self.top_k:
            least = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            falling = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax(falling, axis=-1)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities  # of all that are more likely
            least = jnp.where(before < self.top_p, falling, jnp.inf).min(axis=-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits

    def choose(self, logits_BxV: Array, key: Array) -> Array:
        """Token ids [B] int32."""
        if self.temperature == 0:
            return logits_BxV.argmax(axis=-1).astype(jnp.int32)
        return jax.random.categorical(key, self.restrict(logits_BxV)).astype(jnp.int32)


def log_probability(logits: Array, token: Array) -> Array:
    """Of the tokens, under the model itself: logits [..., V], tokens [...] → [...]."""
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
