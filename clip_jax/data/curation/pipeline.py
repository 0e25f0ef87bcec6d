"""The stages of curation, each an Apache Beam pipeline that reads what earlier ones wrote and writes files.

    scan     pairs → a table of rows (`records`) for each part of the source
    unique   rows → which pairs are no duplicates, for each part
    counts   → pairs of each query before, and after, filters and duplicates
    cuts     → the largest rank that each query keeps (rule `cap`)
    balance  → which pairs stay, for each part
    shards   → the pairs that stay

Every file is there whole or not at all; of `scan` and `shards` a restart makes those that are missing, of the others a
stage that has not said that it is done. Nothing is kept anywhere else, and what a worker needs, it reads from these
files: so it is the same on one machine, on Dataflow, Flink or Spark.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from clip_jax.data.curation import files, records, shards, stages
from clip_jax.data.curation.queries import (
    Origin,
    Query,
    count_words,
    from_counts,
    read_counts,
    read_queries,
    read_synsets,
    read_titles,
    unique,
    write_queries,
)
from clip_jax.data.curation.settings import Settings
from clip_jax.data.sources import open_source
from clip_jax.errors import DataError, UserError
from clip_jax.progress import brief


def curate(settings: Settings, runner: str = "DirectRunner", beam_options: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the stages that are not done yet; returns what each says of itself, stage → figures.

    Raises DataError where the folder holds another curation, a stage's input changed, or the runner failed.
    """
    size = len(open_source(settings.input))
    check_same(settings, size)
    files.remove_leftovers(settings.output)
    parts = list(range(-(-size // settings.part)))
    with logging_redirect_tqdm(), brief(total=5 + (settings.balance == "cap"), desc="curate", unit="stage") as bar:
        run = Runner(settings, runner, beam_options, bar)
        there = files.names(f"{settings.output}/work/scan")
        missing = [part for part in parts if f"{part:06d}.parquet" not in there]
        run.stage("scan", lambda root: stages.scan(root, settings, missing, size), size, bool(missing))
        run.stage("unique", lambda root: stages.unique(root, settings, parts, size), size)
        run.stage("counts", lambda root: stages.count(root, settings, parts), size)
        if settings.balance == "cap":
            run.stage("cuts", lambda root: stages.cut(root, settings, parts), size)
        run.stage("balance", lambda root: stages.balanced(root, settings, parts), size)
        sizes = files.read_table(settings.file("balance", "sizes"))["pairs"].to_pylist()
        planned = shards.plan(sizes, settings.shard_size)
        if not planned:
            raise DataError(f"{settings.input}: no pair stays; the reasons are in {settings.file('counts', 'reasons')}")
        there = files.names(settings.shards)
        stems = [shards.stem(settings.shards, i, len(planned)) for i in range(len(planned))]
        missing = [i for i, stem in enumerate(stems) if f"{stem.rpartition('/')[2]}.parquet" not in there]
        pairs, some = sum(sizes), bool(missing)
        run.stage("shards", lambda root: stages.write_shards(root, settings, planned, missing), pairs, some)
        return run.said


def make_queries(
    path: str, work: str, origin: Origin, runner: str = "DirectRunner", beam_options: Sequence[str] = ()
) -> None:
    """Writes the list of queries to `path`, unless it is there; `work` is the folder of what it takes to make it.

    Raises DataError where it was made of something else, what it is made of can't be read, or nothing comes of it.
    """
    said, mine = f"{work}/origin.json", json.dumps(dataclasses.asdict(origin), indent=1)
    if files.exists(path):
        if not files.exists(said) or files.read_text(said) != mine:
            raise DataError(f"{path}: of another origin ({said}); expected the same, or another --output")
        return
    found: list[Query] = []
    if origin.queries:
        found = read_queries(origin.queries)
    if origin.corpus:
        counts = f"{work}/counts.parquet"
        run_pipeline(lambda root: count_words(root, origin, counts), runner, beam_options)
        found += from_counts(read_counts(counts), origin.rules)
    if origin.titles:
        found += read_titles(origin.titles, origin.min_volume)
    if origin.synsets:
        found += read_synsets(origin.synsets)
    found = unique(found)
    if not found:
        raise DataError(f"{path}: no queries; expected some, or words that occur {origin.rules.min_count} times")
    files.write_text(said, mine)
    write_queries(path, found)


class Runner:
    """Runs a stage unless it is done, and writes down that it is, and what it took."""

    def __init__(self, settings: Settings, runner: str, beam_options: Sequence[str], bar: tqdm):
        self._settings, self._runner, self._options, self._bar = settings, runner, list(beam_options), bar
        self.said: dict[str, Any] = {}

    def stage(self, name: str, build: Callable[[Any], Any], pairs: int, missing: bool = False) -> None:
        self._bar.set_description(f"curate: {name}")
        self._run(name, build, pairs, missing)
        self._bar.update()

    def _run(self, name: str, build: Callable[[Any], Any], pairs: int, missing: bool) -> None:
        done = self._settings.file(name)
        if files.exists(done) and not missing:
            self.said[name] = json.loads(files.read_text(done)) | {"again": False}
            return
        start = time.perf_counter(), time.process_time()
        run_pipeline(build, self._runner, self._options)
        said = {
            "pairs": pairs,
            "seconds": round(time.perf_counter() - start[0], 2),
            "cpu_seconds": round(time.process_time() - start[1], 2),  # of this process: of the workers, if they are it
        }
        files.write_text(done, json.dumps(said))
        self.said[name] = said | {"again": True}
        logging.info("%-8s %12s pairs %10.1f s", name, f"{pairs:,}", said["seconds"])


def run_pipeline(build: Callable[[Any], Any], runner: str, beam_options: Sequence[str]) -> None:
    """Builds a pipeline and waits for its end. Raises DataError where it fails, with its last line."""
    if runner == "DirectRunner":  # which would fetch a program to run it with
        runner = "FnApiRunner"
    options = PipelineOptions([*beam_options, f"--runner={runner}"], save_main_session=False)
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    try:
        pipeline = beam.Pipeline(options=options)
        build(pipeline)
        result = pipeline.run()
        result.wait_until_finish()
    except UserError:
        raise
    except Exception as error:  # a runner wraps what a worker raised in its own
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise DataError(f"{runner}: {lines[-1] if lines else type(error).__name__}") from error


def check_same(settings: Settings, size: int) -> None:
    """Raises DataError, naming one of them, where the output folder was made with other settings."""
    path = f"{settings.output}/work/settings.json"
    mine = json.loads(json.dumps(dataclasses.asdict(settings))) | {"pairs": size}
    mine["queries"] = records.digest(files.read_text(settings.queries).encode()).hex()
    del mine["output"]
    if not files.exists(path):
        files.write_text(path, json.dumps(mine, indent=1))
        return
    theirs = json.loads(files.read_text(path))
    for key, value in mine.items():
        if theirs.get(key) != value:
            raise DataError(
                f"{path}: made with {key} {theirs.get(key)!r}, now {value!r}; expected the same, or another --output"
            )
