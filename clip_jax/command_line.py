"""What the console scripts share: help with examples, completion, one clear line for an error, quiet libraries."""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from clip_jax.errors import DataError, UserError

PACKAGE = "clip-flamingo-jax"
STOPPED = 130  # what a shell makes of Ctrl-C


class Parser(argparse.ArgumentParser):
    """An ArgumentParser of a program with commands, whose help ends with examples.

    Args:
      doc: what the program is, an empty line, and examples, one a line: each command's help shows its own.
    """

    def __init__(self, prog: str, doc: str):
        what, _, examples = doc.partition("\n\n")
        self._examples = [line for line in examples.strip().splitlines() if line]
        super().__init__(
            prog=prog,
            description=what,
            epilog="\n".join(
                [
                    "examples:",
                    *(f"  {line}" for line in self._examples),
                    "",
                    f"{prog} COMMAND --help says more. Completion in bash and zsh:",
                    f'  eval "$(register-python-argcomplete {prog})"',
                ]
            ),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        try:
            number = version(PACKAGE)
        except PackageNotFoundError:  # run from a checkout
            number = "(not installed)"
        self.add_argument("--version", action="version", version=f"{PACKAGE} {number}")
        self.commands = self.add_subparsers(
            title="commands", dest="command", metavar="COMMAND", required=True, parser_class=argparse.ArgumentParser
        )

    def command(self, name: str, function: Any, text: str) -> argparse.ArgumentParser:
        """A command that calls `function` with its arguments; `text` is a sentence."""
        examples = [f"  {line}" for line in self._examples if line.split()[1] == name]
        one: argparse.ArgumentParser = self.commands.add_parser(
            name,
            help=text[0].lower() + text[1:].rstrip("."),
            description=text,
            epilog="\n".join(["examples:", *examples]) if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(run=function)
        one.add_argument("--debug", action="store_true", help="show where an error came from")
        return one


def run(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> None:
    """Parses the arguments and calls what `run` is set to with them (it needs `debug`, too); exits with its outcome.

    0: done; 1: an error, in one line; 2: arguments that are none; 130: stopped by Ctrl-C.
    """
    import argcomplete

    argcomplete.autocomplete(parser)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    for noisy in ("absl", "jax", "orbax", "etils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # names of files may be no valid Unicode
    with errors_in_one_line(arguments.debug):
        arguments.run(arguments)


@contextlib.contextmanager
def errors_in_one_line(debug: bool = False) -> Iterator[None]:
    """Ends the program with one line for an error that a user can mend: 1; and 130 for Ctrl-C.

    `debug`: errors come with their trace.
    """
    try:
        yield
        sys.stdout.flush()  # here, where it is heard that nobody reads it
    except UserError as error:
        if debug:
            raise
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # whoever read what is printed has enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if debug or error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        stop()


def stop() -> NoReturn:
    print("stopped", file=sys.stderr)
    sys.exit(STOPPED)


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
