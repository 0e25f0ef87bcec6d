"""How probable each label is for each image, for models without an embedding of texts.

Dimension letters: B images, C labels, L tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.evaluation.encoder import nothing

AT_A_TIME = 2**25  # values of `values_per_token` for each token that a device holds at a time


@dataclass(frozen=True)
class LabelScores:
    """Scores of texts by a jitted function; every process calls it alike and gets all the scores.

    `function(params, state, rows [B, …], ids [C, L])` → log p of each label for each image [B, C], replicated.
    `values_per_token`: of what is computed for one image, label and token, the numbers that count.
    """

    function: Callable[[Any, Any, jax.Array, np.ndarray], jax.Array]
    params: Any
    state: Any
    mesh: Mesh
    tokenize: Callable[[Sequence[str]], np.ndarray]
    end_id: int
    batch_size: int
    values_per_token: int
    between: Callable[[], None] = nothing  # called before every batch; what it raises ends the work

    def __call__(self, rows: np.ndarray, names: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        """[len(rows), len(names)] float32; of several prompts for a name, the mean."""
        prompts = [template.format(name) for name in names for template in templates]
        scores = self._scores(rows, self.tokenize(prompts))
        return scores.reshape(len(rows), len(names), len(templates)).mean(axis=2)

    def _scores(self, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        # Labels of about one length together: what follows an end token need not be computed.
        lengths = (ids == self.end_id).argmax(axis=1) + 1
        lengths = np.minimum(-(-lengths // 4) * 4, ids.shape[1])
        where = sharding.batch_sharding(self.mesh)
        mine = sharding.local_rows(where, self.batch_size)
        padded = np.pad(rows, [(0, -len(rows) % self.batch_size), *[(0, 0)] * (rows.ndim - 1)], mode="edge")
        scores = np.empty((len(padded), len(ids)), np.float32)
        images = self.batch_size // sharding.batch_shards(self.mesh)
        for start in range(0, len(padded), self.batch_size):
            batch = sharding.put_batch({"rows": padded[start + mine]}, where, self.batch_size)["rows"]
            for length in np.unique(lengths):
                labels = np.flatnonzero(lengths == length)
                room = AT_A_TIME // (images * int(length) * self.values_per_token)
                size = min(2 ** max(0, room.bit_length() - 1), 256)  # few sizes: each is compiled
                for some in np.split(labels, range(size, len(labels), size)):
                    self.between()
                    filled = np.pad(some, (0, size - len(some)), mode="edge")
                    found = self.function(self.params, self.state, batch, ids[filled, :length])
                    scores[start : start + self.batch_size, some] = np.asarray(found)[:, : len(some)]
        return scores[: len(rows)]
