"""Speed and memory beside the libraries that users come from: `python -m launch.benchmark flamingo`.

A row runs both sides on the same weights and inputs, in turns, and prints a table. Its libraries come with the extra
`peers` (`pip install -e ".[peers]"`); a part whose library is absent is named and left out.
"""

import argparse
import importlib
import sys

from clip_jax.errors import UserError

# name: the module whose `main(rounds)` prints the row
ROWS = {"flamingo": "launch.benchmarking.decode"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.benchmark", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("row", nargs="+", choices=ROWS)
    parser.add_argument("--rounds", type=int, default=5, help="turns that each side takes")
    arguments = parser.parse_args()
    for row in arguments.row:
        try:
            importlib.import_module(ROWS[row]).main(max(1, arguments.rounds))
        except UserError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
