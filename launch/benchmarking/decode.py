"""Flamingo's decoding beside transformers' IDEFICS and beside OpenFlamingo, on the same random weights: a 4-shot
prompt (5 images of 224² pixels, 160 tokens), 32 greedy tokens, float32.

Each design's module has its sizes: of IDEFICS some 112 and 309 million parameters.
"""

import importlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_jax.errors import UserError
from launch.benchmarking.limits import matmul_rate, reading_rate
from launch.benchmarking.peers import NEW, Said
from launch.benchmarking.rows import OURS, Result, Row, Settings, Skipped, interleave
from launch.benchmarking.turns import Measured, Run, program

BATCHES = (1, 8)
PREFILL_GOAL, DECODE_GOALS = 1.2, {1: 1.5, 8: 2.0}
DESIGNS = {  # what is needed; the first is the other side
    "idefics": ("transformers", "torch"),
    "open_flamingo": ("open_flamingo", "transformers", "torch", "open_clip", "einops_exts"),
}


class Needs(NamedTuple):
    """What no program does without."""

    flops: int  # of the products of a prefill
    bytes: int  # of the weights that each token is made with


def our_run(design: str, directory: Path) -> Run:
    """A turn; or, with `turn` False, what it needs."""
    import jax

    from flamingo_jax import decoding
    from flamingo_jax.models.variants import build_flamingo

    peer = importlib.import_module(f"launch.benchmarking.{design}")
    imported = peer.read(directory)
    model, variables = build_flamingo(imported.config), jax.device_put(decoding.unstack(imported.variables))
    del imported
    prepared = {batch: jax.device_put(peer.our_batch(batch)) for batch in BATCHES}
    return lambda batch, turn=True: (speak if turn else needs)(model, variables, prepared[batch])


def speak(model: Any, variables: Any, batch: Any) -> Said:
    """Reads the prompts and says `NEW` tokens, greedily."""
    import jax

    from flamingo_jax import decoding

    start = time.perf_counter()
    logits, cache = jax.block_until_ready(decoding.read_prompts(model, variables, batch, NEW - 1))
    read = time.perf_counter()
    said, _ = jax.block_until_ready(decoding.resume(model, variables, logits, cache, max_new_tokens=NEW))
    return Said(read - start, time.perf_counter() - read, np.asarray(said.tokens))


def needs(model: Any, variables: Any, batch: Any) -> Needs:
    import jax

    from flamingo_jax import decoding
    from launch.planning.model_flops import products_flops

    read, params = partial(decoding.prefill, model, room=NEW - 1), variables["params"]
    spoken = {name: params[name] for name in ("language_model", "gated", "extra_head") if name in params}
    if not model.language_model.spec.tied:  # of an embedding by itself a token reads one row
        spoken["language_model"] = {k: v for k, v in spoken["language_model"].items() if k != "embedding"}
    return Needs(
        products_flops(jax.make_jaxpr(read)(variables, batch).jaxpr),
        sum(leaf.nbytes for leaf in jax.tree.leaves(spoken)),
    )


def rows(settings: Settings) -> Iterator[Result]:
    """A design whose peer is not installed is named and left out."""
    batches = (1,) if settings.quick else BATCHES
    for design, needed in DESIGNS.items():
        name = f"Flamingo, {design}'s design"
        if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
            yield Skipped(name, f"{', '.join(absent)} not installed")
            continue
        sizes = importlib.import_module(f"launch.benchmarking.{design}").SIZES
        for size in list(sizes)[:1] if settings.quick else sizes:
            yield from rows_of(name, design, size, batches, settings)


def rows_of(name: str, design: str, size: str, batches: tuple[int, ...], settings: Settings) -> Iterator[Row]:
    """One size of a design."""
    peer, library = importlib.import_module(f"launch.benchmarking.{design}"), DESIGNS[design][0]
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        with program(peer.save_weights, directory, peer.SIZES[size]) as count:
            parameters = count().result
        with program(our_run, design, directory) as ours, program(peer.peer_run, directory, batches) as theirs:
            for batch in batches:
                found = interleave({OURS: ours, library: theirs}, settings.rounds, batch)
                needs = ours(batch, False).result
                yield from measured(f"{name} ({parameters / 1e6:.0f} M), batch {batch}", batch, found, needs)


def measured(name: str, batch: int, found: dict[str, list[Measured]], needs: Needs) -> Iterator[Row]:
    """Prefill, decoding and memory. Raises UserError where more than a tenth of the tokens differ.

    (Greedy tokens after a near tie are others on another order of summation, and so are all that follow them.)
    """
    peer = list(found)[1]
    same = np.mean(found[OURS][0].result.tokens == found[peer][0].result.tokens)
    if same < 0.9:
        raise UserError(f"{name}: {same:.0%} of the tokens are {peer}'s; nothing is compared")
    for part, goal, limit, limit_name in (
        ("prefill", PREFILL_GOAL, needs.flops / matmul_rate(), "bare matrix products"),
        ("decode", DECODE_GOALS[batch], (NEW - 1) * needs.bytes / reading_rate(), "reading the weights for each token"),
    ):
        ours, theirs = ([getattr(run.result, part) for run in found[side][1:]] for side in (OURS, peer))
        yield Row(f"{name}: {part}", peer, ours, theirs, goal, limit=limit, limit_name=limit_name)
    most = {side: max(run.peak_mib for run in found[side][1:]) for side in (OURS, peer)}
    yield Row(f"{name}: memory", peer, [most[OURS]], [most[peer]], None, unit="MiB")
