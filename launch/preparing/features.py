"""`features`: what a frozen vision tower makes of a data set's images, computed once."""

import argparse
from pathlib import Path
from typing import Any

from launch.preparing import Outcome


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("features", help="what a config's frozen vision tower makes of a data set's images")
    parser.add_argument("--config", required=True, help="a configs/flamingo/*.py file; --config.KEY=VALUE changes it")
    parser.add_argument("--stream", required=True, help="the data set's name in data.mixture")
    parser.add_argument("--output", type=Path, required=True, help="the directory, the stream's `features` later")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: bfloat16")
    parser.set_defaults(run=run, overrides=[])


def run(arguments: argparse.Namespace) -> Outcome:
    import jax

    from clip_jax.sharding import make_mesh
    from flamingo_jax.training.cached_features import prepare_features
    from flamingo_jax.training.flamingo_task import FlamingoTask
    from launch import command

    config = command.config_with(arguments.config, arguments.overrides)
    config.data.mixture = {
        name: {**part, "features": ""} for name, part in config.data.mixture.items() if name == arguments.stream
    }
    task = FlamingoTask(config, make_mesh(config.mesh.to_dict(), jax.devices()))
    manifest = prepare_features(
        task, arguments.stream, arguments.output, batch_size=arguments.batch_size, dtype=arguments.dtype
    )
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    text = (
        f"{arguments.output}: {manifest['images']:,} images of {manifest['records']:,} records ({manifest['missing']} "
        f"left out), {manifest['dtype']} {manifest['item']} each frame, {size / 1e6:,.1f} MB"
    )
    return Outcome(text, {key: manifest[key] for key in ("images", "records", "missing")} | {"bytes": size})
