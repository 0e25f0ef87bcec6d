"""Workdirs of runs that never were."""

from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from clip_jax import sharding
from clip_jax.training import checkpoint
from clip_jax.training.loop import run_metadata


def write_run(workdir: Path, config: ml_collections.ConfigDict, task: Any) -> None:
    """A run's workdir with checkpoint 7 of a task's model, of random numbers, so that images matter."""
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        if leaf.ndim < 2 or "norm" in name or "mean" in name:
            value = 0.05 if "var" in name else float("bias" not in name and "mean" not in name)
            return np.full(leaf.shape, value, np.float32)
        return rng.normal(0, 0.5 if "gated" in name or "resampler" in name else 0.2, leaf.shape).astype(np.float32)

    shapes = sharding.unbox(jax.eval_shape(task.init, jax.random.key(0)))
    params, state = jax.tree_util.tree_map_with_path(draw, shapes)
    items = {f"params.{name}": {name: tree} for name, tree in params.items()} | ({"state": state} if state else {})
    (workdir / "checkpoints").mkdir(parents=True)
    checkpoint.write(workdir / "checkpoints" / "00000007", items, run_metadata(config, task) | {"step": 7})
