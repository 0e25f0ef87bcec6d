"""What the console scripts share: one clear line for an error, quiet libraries, arguments, images that are left out."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence

from clip_jax.errors import DataError, UserError


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Parses the arguments and calls what `run` is set to, with them; exits with its outcome."""
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("absl", "jax", "orbax", "etils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # names of files may be no valid Unicode
    try:
        arguments.run(arguments)
    except UserError as error:
        if os.environ.get("TRACEBACK"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1 expected")
    return int(text)


def report_rejected(rejected: Sequence[str], count: int) -> None:
    """Names the images that are left out. Raises DataError where none is left."""
    for line in rejected:
        logging.warning("left out: %s", line)
    if len(rejected) == count:
        raise DataError(f"not one of {count} images could be read")
