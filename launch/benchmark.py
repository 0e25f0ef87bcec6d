"""Speed and memory beside the libraries that users come from: `python -m launch.benchmark flamingo data`.

A row runs both sides on the same weights and inputs, in turns, and prints a table. Its libraries come with the extra
`peers` (`pip install -e ".[peers]"`), but for open_flamingo (`pip install --no-deps open_flamingo einops einops_exts`);
a part whose library is absent is named and left out.
"""

import argparse
import importlib
import sys

from clip_jax.errors import UserError

# name: the module whose `main(rounds)` prints the row
ROWS = {"flamingo": "launch.benchmarking.decode", "data": "launch.benchmarking.data"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.benchmark", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("row", nargs="+", choices=ROWS)
    parser.add_argument("--rounds", type=int, default=5, help="turns that each side takes")
    parser.add_argument("--json", action="store_true", help="all figures as JSON instead of the table (of data only)")
    arguments = parser.parse_args()
    for row in arguments.row:
        try:
            options = {"as_json": True} if arguments.json and row == "data" else {}
            importlib.import_module(ROWS[row]).main(max(1, arguments.rounds), **options)
        except UserError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
