"""Builds data sets.

python -m launch.prepare emoji      # the embedded emoji, from pinned packages (needs npm and the extra `prepare`)
"""

import argparse
import logging
import sys
from pathlib import Path

from clip_jax.data import emoji
from clip_jax.data.sources import ASSETS
from clip_jax.errors import UserError


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.prepare", description="Builds data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("emoji", help="the embedded emoji, from pinned npm packages")
    one.add_argument("--output", type=Path, default=ASSETS / "emoji", help="default: where it is committed")
    one.add_argument("--cache", type=Path, default=Path(".cache/npm"), help="where the packages are kept")
    one.add_argument("--size", type=int, default=48, help="side of the pictures in pixels (default: 48)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sizes = emoji.build(arguments.output, arguments.cache, arguments.size)
    except UserError as error:
        sys.exit(f"error: {error}")
    for name, size in sizes.items():
        print(f"{name:32} {size:6} pictures")


if __name__ == "__main__":
    main()
