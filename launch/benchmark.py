"""Speed and memory beside the libraries that users come from, on this machine: `python -m launch.benchmark`.

Each row runs both sides on the same weights and inputs, in turns A B A B, in processes of their own, and refuses to
compare them where their outputs differ. The libraries come with the extras `peers` and `tpu` (`pip install -e
".[peers,tpu]"`), but for open_flamingo (`pip install --no-deps open_flamingo einops einops_exts`); a row whose library
is absent is named and left out.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from clip_jax.command_line import errors_in_one_line, positive
from clip_jax.errors import UserError
from launch.benchmarking import clip, compile_time, data, decode, gpu, loss, start
from launch.benchmarking.rows import (
    Result,
    Row,
    Rows,
    Settings,
    Skipped,
    about_this_run,
    check_writable,
    put,
    read_json,
    to_markdown,
    write,
)

ROWS: dict[str, Rows] = {
    **{group: partial(clip.rows, group) for group in clip.CASES},
    "loss": loss.rows,
    "flamingo": decode.rows,
    "data": data.rows,
    "start": start.rows,
    **{group: partial(compile_time.rows, group) for group in compile_time.MODELS},
    "gpu": gpu.rows,
}
# For both sides' processes: large pages, and memory that was freed kept instead of given back and zeroed again (glibc).
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=16000000000:glibc.malloc.mmap_threshold=16000000000"
ASKED_FOR = ("compile-flamingo",)  # run only where named: it takes long
DEFAULT = [name for name in ROWS if name not in ASKED_FOR]


def row(name: str) -> str:
    if name not in ROWS:
        raise argparse.ArgumentTypeError(f"{name!r}: no such row; expected {', '.join(ROWS)}")
    return name


def parser() -> argparse.ArgumentParser:
    description, _, more = (__doc__ or "").partition("\n\n")
    found = argparse.ArgumentParser(
        prog="python -m launch.benchmark",
        description=description,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "row",
        nargs="*",
        type=row,
        metavar="ROW",
        help=f"which: {', '.join(ROWS)}; by default all but {', '.join(ASKED_FOR)}",
    )
    found.add_argument("--rounds", type=positive, default=5, help="turns that each side takes (default: %(default)s)")
    found.add_argument("--quick", action="store_true", help="small shapes and one turn: whether all runs, not how fast")
    found.add_argument("--json", metavar="FILE", help="the same figures, every turn's, as JSON")
    found.add_argument("--add", action="store_true", help="keep the other rows that --json FILE has of an earlier run")
    found.add_argument("--plot", metavar="FILE.png", help="the ratios as a picture")
    found.add_argument("--debug", action="store_true", help="show where an error came from")
    found.add_argument("--table", metavar="FILE.md", help="the table, as printed")
    return found


def main() -> None:
    top = parser()
    arguments = top.parse_args()
    if arguments.add and not arguments.json:
        top.error("--add: expected --json FILE, whose rows are kept")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("GLIBC_TUNABLES", MALLOC)
    settings = Settings(1 if arguments.quick else arguments.rounds, arguments.quick)
    about, results = about_this_run(sys.argv[1:]), list[Result]()
    save = partial(write, results, about, arguments.json, arguments.plot, arguments.table)
    with errors_in_one_line(arguments.debug):
        if arguments.add:
            results += read_json(Path(arguments.json))
        check_writable(arguments.json, arguments.plot, arguments.table)  # before hours of measuring
        failed = [
            name for name in arguments.row or DEFAULT if not measure(name, settings, results, save, about["commit"])
        ]
    print(to_markdown(results, about))
    if failed:
        sys.exit(1)


def measure(name: str, settings: Settings, results: list[Result], save: Callable[[], None], commit: str = "") -> bool:
    """Whether all rows of that name were measured, each saved as it came; what fails is a row that says so."""
    results[:] = [row for row in results if isinstance(row, Row) or row.group != name]
    rows = ROWS[name](settings)
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # one row's trouble, a peer's perhaps, is not the others'
            if not isinstance(error, UserError):
                traceback.print_exc()
            row, ok = Skipped(name, f"failed: {error if isinstance(error, UserError) else repr(error)}"), False
        else:
            ok = True
        if row is None:
            return True
        put(results, replace(row, commit=commit) if isinstance(row, Row) else replace(row, group=name))
        print(f"{row.name}: {row.why if isinstance(row, Skipped) else f'{row.ratio:.2f}×'}", file=sys.stderr)
        save()
        if not ok:
            return False


if __name__ == "__main__":
    main()
