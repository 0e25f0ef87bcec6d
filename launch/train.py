"""Trains what a config describes.

    python -m launch.train --config configs/clip/quickstart.py --workdir runs/quickstart/clip
    python -m launch.train --config FILE --workdir DIR --config.optimizer.lr=1e-3

Run again with the same workdir, it goes on where it stopped. On SIGTERM, to any of its processes, and on Ctrl-C it
saves, and exits with 0, or with STOPPED_EXIT_CODE where the environment sets it for a launcher to know.
"""

import os
import sys
from pathlib import Path

import jax
import ml_collections
from absl import flags

from clip_jax.errors import ConfigError
from clip_jax.sharding import make_mesh
from clip_jax.training.loop import train
from clip_jax.training.preemption import StoppedError
from launch import command
from launch.planning.ideal import ideal_seconds
from launch.tasks import build_task

WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of the run: checkpoints, metrics, config.", allow_override=True
)


def main(config: ml_collections.ConfigDict) -> None:
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: name a directory for the run")
    if "://" in WORKDIR.value:  # pathlib would make a directory "gs:" here, which no other host sees
        raise ConfigError(
            f"--workdir {WORKDIR.value}: a directory is expected; mount the bucket, and name a directory in it "
            "(launch/README.md)"
        )
    mesh = make_mesh(config.mesh.to_dict(), jax.devices())
    ideal = ideal_seconds(config, build_task, jax.devices())
    try:
        state = train(config, build_task(config, mesh), Path(WORKDIR.value), mesh, ideal)
        stopped = int(state.step) < config.steps
    except StoppedError:
        stopped = True
    if stopped:
        sys.exit(int(os.environ.get("STOPPED_EXIT_CODE", "0")))


if __name__ == "__main__":
    command.run(main, with_config=True)
