"""Which updates count: those of a loss and a gradient that are finite, and not far above what gradients were.

The others are skipped inside the jitted step: parameters, optimiser state and BatchNorm statistics stay as they are,
bit for bit, and what is kept of the others is the same bits as without a guard.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
DECAY = 0.99  # of the running mean of gradient norms
SPIKES_FROM = 100  # updates, of which the mean must know to judge others by it


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """Part of the training state, so that a resumed run judges and counts alike. All are scalars."""

    skipped: jax.Array  # int32, since step 0
    in_a_row: jax.Array  # int32, up to now
    accepted: jax.Array  # int32, of which `norm` knows
    norm: jax.Array  # float32: running mean of accepted gradient norms, starting at 0


def new_guard() -> Guard:
    zero = jnp.zeros((), jnp.int32)
    return Guard(skipped=zero, in_a_row=zero, accepted=zero, norm=jnp.zeros((), jnp.float32))


def judge(guard: Guard, loss: jax.Array, norm: jax.Array, spike_factor: float) -> tuple[jax.Array, Guard]:
    """(whether the update counts: bool, the guard after it).

    It does not where loss or gradient norm is not finite or, with a `spike_factor` other than 0, where the norm is
    more than so many times the running mean of those before it.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    if spike_factor:
        mean = guard.norm / (1 - DECAY ** jnp.maximum(guard.accepted, 1).astype(jnp.float32))
        good &= (guard.accepted < SPIKES_FROM) | (norm <= spike_factor * mean)
    after = Guard(
        skipped=guard.skipped + ~good,
        in_a_row=jnp.where(good, 0, guard.in_a_row + 1),
        accepted=guard.accepted + good,
        norm=jnp.where(good, DECAY * guard.norm + (1 - DECAY) * norm, guard.norm),
    )
    return good, after


def select(good: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the update counts, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
