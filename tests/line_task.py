"""The smallest task that the trainer can train: a straight line, whose examples a test may spoil."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from clip_jax import sharding
from clip_jax.data.pipeline import Stream
from clip_jax.training.loop import train
from clip_jax.training.state import TrainState
from configs.flamingo.common import run_config
from launch import command

BATCH = 4
W = np.arange(1.0, 5.0, dtype=np.float32)


class LineTask:
    """y = W·x.

    `spoil(step)` multiplies the examples of a step (from 1 on) by what it returns. `during(n)` is called in the n-th
    evaluation: with `evaluate_every` 1, that after step n.
    """

    schedule = "accumulate"

    def __init__(
        self, spoil: Callable[[int], float] = lambda step: 1.0, during: Callable[[int], None] = lambda n: None
    ):
        self.spoil, self.during, self.evaluations = spoil, during, 0

    def init(self, rng: jax.Array) -> tuple[Any, Any]:
        return {"line": {"w": jax.random.normal(rng, (4,))}}, {}

    def sources(self) -> Mapping[str, str]:
        return {}

    def loss(self, trainable: Any, frozen: Any, state: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, Any]:
        error = batch["x"] @ trainable["line"]["w"] - batch["y"]
        return jnp.mean(error**2), ({}, state)

    def streams(self) -> Mapping[str, Stream]:
        def element(position: int) -> dict[str, np.ndarray]:
            factor = np.float32(self.spoil(position // BATCH + 1))
            x = np.random.default_rng(position).normal(size=4).astype(np.float32)
            return {"x": x * factor, "y": np.asarray(x @ W)}

        return {"points": Stream(element, BATCH)}

    def evaluate(
        self, params: Any, state: Any, mesh: jax.sharding.Mesh, between: Callable[[], None]
    ) -> dict[str, float]:
        between()
        self.evaluations += 1
        self.during(self.evaluations)
        return {"w0": float(params["line"]["w"][0])}

    def metadata(self) -> dict[str, Any]:
        return {"family": "line"}


def config_of(**changes: Any) -> ml_collections.ConfigDict:
    """A config of 6 steps that logs and evaluates each, and saves every second; keys with dots are given with "__"."""
    config = run_config("line")
    config.steps, config.log_every, config.checkpoint_every = 6, 1, 2
    config.optimizer.lr, config.optimizer.warmup_steps = 0.1, 1
    config.evaluate_every = 1
    config.data.threads = 1
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def run_together(workdir: Path, task: LineTask | None = None, **changes: Any) -> None:
    """The same as a command, over all devices of all processes that the environment names."""
    command.run(lambda: train(config_of(**changes), task or LineTask(), workdir, sharding.make_mesh()))


def run(workdir: Path, task: LineTask | None = None, ideal_seconds: float | None = None, **changes: Any) -> TrainState:
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return train(config_of(**changes), task or LineTask(), workdir, mesh, ideal_seconds)
