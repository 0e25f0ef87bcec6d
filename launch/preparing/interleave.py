"""`interleave`: pages of HTML, published pages or groups of pairs as interleaved JSON lines with their images."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.errors import ConfigError
from clip_jax.files import read_lines
from launch.preparing import Outcome


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "interleave", help="HTML pages, MMC4, OBELICS, or pairs in groups, as interleaved JSON lines with their images"
    )
    parser.add_argument(
        "spec", nargs="?", metavar="SPEC", help="html:FOLDER, mmc4:…, obelics:… or json:…, with filters: ?min_side=64&…"
    )
    parser.add_argument("--from-pairs", metavar="SPEC", help="pages out of pairs: any data source of pairs")
    parser.add_argument("--images-each", type=int, default=4, help="pairs a page, with --from-pairs (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the permutation that groups them (default: 0)")
    parser.add_argument("--output", type=Path, required=True, help="a new folder, or one to go on with")
    parser.add_argument("--blocked", type=Path, metavar="FILE", help="words, one a line: pages with one are left out")
    parser.add_argument("--tars", action="store_true", help="images in tars, one a shard, instead of a folder")
    parser.add_argument("--shard-size", type=int, default=1024, help="pages read for a shard (default: 1024)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> Outcome:
    from flamingo_jax.data.interleaving import Job, write_pages, written_spec

    if bool(arguments.spec) == bool(arguments.from_pairs):
        raise ConfigError("interleave: expected SPEC or --from-pairs SPEC, one of them")
    spec = arguments.spec or f"pairs:{arguments.from_pairs}?images={arguments.images_each}&seed={arguments.seed}"
    blocked = tuple(read_lines(arguments.blocked)) if arguments.blocked else ()
    job = Job(spec, arguments.shard_size, arguments.tars, blocked)
    counts = write_pages(job, arguments.output, arguments.workers)
    lines = [
        f"{arguments.output}: {counts['written']:,} pages with {counts['images']:,} images and "
        f"{counts['characters']:,} characters, of {counts['read']:,} read",
        *reasons("pages left out", counts["left_out"]),
        *reasons("images left out", counts["images_left_out"]),
        f"kind interleaved, source {(source := written_spec(job, arguments.output))}",
    ]
    return Outcome("\n".join(lines), {**counts, "source": source})


def reasons(what: str, counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    listed = ", ".join(f"{reason.replace('_', ' ')} {count:,}" for reason, count in counts.items())
    return [f"{what}: {sum(counts.values()):,} ({listed})"]
