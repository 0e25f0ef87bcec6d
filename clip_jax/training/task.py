"""What the trainer asks of a task. CLIP is one, Flamingo another: the trainer knows neither's model."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from clip_jax.data.pipeline import Stream

PyTree = Any


class Task(Protocol):
    schedule: str  # of the streams: "accumulate", or "round_robin" (a step for each in turn)

    def init(self, rng: jax.Array) -> tuple[PyTree, PyTree]:
        """(params, state), boxed with their logical axes. Traced abstractly first, so it must be pure.

        `state` is what the forward pass updates by itself: BatchNorm statistics, or {}.
        """
        ...

    def sources(self) -> Mapping[str, str]:
        """Where subtrees come from that are not initialised: top-level key of params → checkpoint directory.

        Asked when a run starts, not when it resumes. Raises ConfigError where a source does not fit the task.
        """
        ...

    def loss(
        self, trainable: PyTree, frozen: PyTree, state: PyTree, batch: Mapping[str, jax.Array], rng: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], PyTree]]:
        """(loss, (metrics, new state)) of a batch of one stream, all means over it. Runs inside the jitted step."""
        ...

    def streams(self) -> Mapping[str, Stream]:
        """What is trained on. A step draws a batch of every stream and accumulates their weighted gradients.

        An element is a pure function of its position. It may hold `rejected`, a count of bad records.
        """
        ...

    def evaluate(self, params: PyTree, state: PyTree, mesh: Mesh, between: Callable[[], None]) -> dict[str, float]:
        """Metrics on held-out data, the same on every process.

        Calls `between` before every batch, equally often on every process. What that raises ends the evaluation.
        """
        ...

    def metadata(self) -> dict[str, Any]:
        """What a checkpoint must say for its parameters to be used: activation, tokenizer, preprocessing."""
        ...
