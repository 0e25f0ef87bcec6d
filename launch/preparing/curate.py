"""`curate`: pairs that CLIP's queries find, at most so many for each, as shards with a report."""

import argparse
from typing import Any

from clip_jax.errors import UserError
from launch.preparing import Outcome

DESCRIPTION = """Chooses pairs as CLIP's paper does: those that a list of queries finds, at most so many for each;
without duplicates; as WebDataset shards, with a report. An Apache Beam pipeline: options of Beam's own come after --.
Run again, it goes on. See clip_jax/data/curation/README.md."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "curate", help="pairs chosen by queries, balanced and filtered", description=DESCRIPTION
    )
    parser.add_argument("--input", required=True, help="a source of pairs, KIND:WHERE")
    parser.add_argument("--output", required=True, help="a folder; gs:// and s3://, too")
    queries = parser.add_argument_group("queries: a list, or made of the others")
    queries.add_argument("--queries", default="", help="a file, a query a line")
    queries.add_argument("--corpus", default="", help="text files (a name or a pattern), KIND:WHERE, or wordnet:SPLIT")
    queries.add_argument("--titles", default="", help="a file, a title a line and, after a tab, its search volume")
    queries.add_argument("--synsets", default="", help="a file, the words of a synset a line, or wordnet:SPLIT")
    queries.add_argument("--min-count", type=int, default=100, help="of a word or bigram in the corpus (default: 100)")
    queries.add_argument("--min-pmi", type=float, default=3.0, help="of bigrams, in bits (default: 3)")
    queries.add_argument("--max-bigrams", type=int, default=100_000, help="those of the highest PMI (default: 100000)")
    queries.add_argument("--min-volume", type=int, default=0, help="of a title (default: 0)")
    chosen = parser.add_argument_group("balance")
    chosen.add_argument("--match", choices=["words", "substring"], default="words", help="default: words")
    chosen.add_argument("--max-per-query", type=int, default=20_000, help="t (default: 20000)")
    chosen.add_argument("--balance", choices=["cap", "probability"], default="cap", help="default: cap")
    chosen.add_argument("--seed", type=int, default=0, help="of which pairs stay (default: 0)")
    refused = parser.add_argument_group("filters")
    refused.add_argument("--min-side", type=int, default=64, help="pixels (default: 64)")
    refused.add_argument("--max-aspect", type=float, default=3.0, help="longer side by shorter (default: 3)")
    refused.add_argument("--min-text", type=int, default=5, help="characters (default: 5)")
    refused.add_argument("--max-text", type=int, default=1000, help="characters (default: 1000)")
    refused.add_argument("--language", default="", help="as en, or en,de (default: any)")
    refused.add_argument("--near-duplicates", type=int, default=3, help="bits of 64 (default: 3; -1 keeps all)")
    refused.add_argument("--max-per-text", type=int, default=10, help="pairs of one text (default: 10; 0: any number)")
    running = parser.add_argument_group("running")
    running.add_argument("--runner", default="DirectRunner", help="Beam's (default: DirectRunner, this machine)")
    running.add_argument("--part", type=int, default=10_000, help="pairs of a unit of work (default: 10000)")
    running.add_argument("--shard-size", type=int, default=10_000, help="pairs of a shard (default: 10000)")
    parser.set_defaults(run=run, overrides=[])


def run(arguments: argparse.Namespace) -> Outcome:
    try:
        from clip_jax.data.curation import pipeline, queries, records, report, settings
    except ImportError as error:
        raise UserError(f"{error.name}: not installed; `curate` needs the extra `curate` (and `parquet`)") from None

    beam_options = arguments.overrides
    if beam_options and beam_options[0] != "--":
        raise UserError(f"{beam_options[0]}: no such option of `curate` (Beam's own come after --)")
    beam_options = beam_options[1:]
    check(arguments)
    languages = tuple(sorted(filter(None, arguments.language.split(","))))
    chosen = settings.Settings(
        input=arguments.input,
        output=arguments.output.rstrip("/"),
        max_per_query=arguments.max_per_query,
        balance=arguments.balance,
        match=arguments.match,
        filters=records.Filters(
            arguments.min_side, arguments.max_aspect, arguments.min_text, arguments.max_text, languages
        ),
        near_duplicates=arguments.near_duplicates,
        max_per_text=arguments.max_per_text,
        seed=arguments.seed,
        part=arguments.part,
        shard_size=arguments.shard_size,
    )
    work = f"{chosen.output}/work/queries"
    origin = queries.Origin(
        queries=arguments.queries,
        corpus=embedded(arguments.corpus, f"{work}/corpus.txt"),
        titles=arguments.titles,
        min_volume=arguments.min_volume,
        synsets=embedded(arguments.synsets, f"{work}/synsets.txt"),
        rules=queries.QueryRules(arguments.min_count, arguments.min_pmi, arguments.max_bigrams),
    )
    pipeline.make_queries(chosen.queries, work, origin, arguments.runner, beam_options)
    stages = pipeline.curate(chosen, arguments.runner, beam_options)
    summary = report.write_report(chosen, stages)
    lines = [f"{count:12,} pairs {report.TITLES[name]}" for name, count in summary["steps"].items()]
    lines.append("left out: " + ", ".join(f"{n:,} {name}" for name, n in summary["dropped"].items() if n))
    lines.append(f"wrote {chosen.shards} and {chosen.output}/report.html")
    return Outcome("\n".join(lines), {name: summary[name] for name in ("steps", "dropped")})


def check(arguments: argparse.Namespace) -> None:
    """Raises UserError for what no pair could pass, and where there are no queries."""
    if not any((arguments.queries, arguments.corpus, arguments.titles, arguments.synsets)):
        raise UserError("no queries: expected --queries, or one of --corpus, --titles and --synsets")
    if arguments.queries and any((arguments.corpus, arguments.titles, arguments.synsets)):
        raise UserError("--queries is a list; expected it alone, or --corpus, --titles and --synsets")
    for name in ("max_per_query", "part", "shard_size", "max_aspect"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: expected at least 1")
    if not -1 <= arguments.near_duplicates <= 8:
        raise UserError(f"--near-duplicates {arguments.near_duplicates}: expected -1 to 8, of 64 bits")


def embedded(spec: str, path: str) -> str:
    """The embedded dictionary as a text file at `path`, a line an entry; anything else as it is."""
    if not spec.startswith("wordnet:"):
        return spec
    from clip_jax.data.curation import files
    from flamingo_jax.data.text import open_texts

    pages = open_texts(spec)
    files.write_text(path, "\n".join(pages[i] for i in range(len(pages))) + "\n")
    return path
