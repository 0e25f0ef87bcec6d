"""The bar of one part of a command: on stderr, gone when the part is done, quiet off a terminal."""

from collections.abc import Iterable
from typing import Any

import jax
from tqdm import tqdm


def brief(over: Iterable[Any] | None = None, *, total: int, desc: str, unit: str) -> tqdm:
    """A bar over `over`, or one to be updated; process 0 shows it, where it takes longer than a moment.

    Below another's bar, a trainer's say, it stands in the next line and leaves nothing there.
    """
    # Where there is one process JAX is not asked: it would look for devices, which not every command needs.
    others = jax.distributed.is_initialized() and jax.process_index() > 0
    return tqdm(
        over, total=total, desc=desc, unit=unit, delay=1, leave=False, dynamic_ncols=True, disable=others or None
    )
