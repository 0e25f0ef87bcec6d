"""Flamingo's decoding beside transformers' IDEFICS and beside OpenFlamingo, on the same random weights: a 4-shot
prompt (5 images of 224² pixels, 160 tokens), 32 greedy tokens, float32.

Some 112 million parameters: a language model of width 512 with 12 layers and 3 gated blocks, a tower of width 384 with
12 layers and a resampler of 6.
"""

import importlib
import importlib.util
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from launch.benchmarking.peers import IMAGES, NEW, TOKENS, Said
from launch.benchmarking.turns import Measured, Run, program

BATCHES = (1, 8)
DESIGNS = {  # what is needed; the first is the other side
    "idefics": ("transformers", "torch"),
    "open_flamingo": ("open_flamingo", "transformers", "torch", "open_clip", "einops_exts"),
}


def our_run(design: str, directory: Path) -> Run:
    import jax

    from flamingo_jax import decoding
    from flamingo_jax.models.variants import build_flamingo

    peer = importlib.import_module(f"launch.benchmarking.{design}")
    imported = peer.read(directory)
    model, variables = build_flamingo(imported.config), jax.device_put(decoding.unstack(imported.variables))
    del imported
    prepared = {batch: jax.device_put(peer.our_batch(batch)) for batch in BATCHES}

    def run(batch: int) -> Said:
        start = time.perf_counter()
        logits, cache = jax.block_until_ready(decoding.read_prompts(model, variables, prepared[batch], NEW - 1))
        read = time.perf_counter()
        said, _ = jax.block_until_ready(decoding.resume(model, variables, logits, cache, max_new_tokens=NEW))
        return Said(read - start, time.perf_counter() - read, np.asarray(said.tokens))

    return run


def main(rounds: int) -> None:
    """Prints the tables. A design whose peer is not installed is named and left out."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    for design, needed in DESIGNS.items():
        if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
            print(f"{design}: left out, as {', '.join(absent)} is not installed\n")
            continue
        peer = importlib.import_module(f"launch.benchmarking.{design}")
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            with program(peer.save_weights, directory) as count:
                parameters = count().result
            print(
                f"{design}, {parameters / 1e6:.0f} million parameters, float32 on {os.cpu_count()} cores; {IMAGES} "
                f"images, {TOKENS} tokens, {NEW} new ones; median (least to most) of {rounds} turns\n"
            )
            with (
                program(peer.peer_run, directory, BATCHES) as theirs,
                program(our_run, design, directory) as ours,
            ):
                for batch in BATCHES:
                    table(batch, measure({needed[0]: theirs, "flamingo_jax": ours}, batch, rounds))


def measure(sides: dict[str, Any], batch: int, rounds: int) -> dict[str, list[Measured]]:
    """All runs of each side, taken in turns after one that is not counted."""
    found: dict[str, list[Measured]] = {side: [] for side in sides}
    for _ in tqdm(range(rounds + 1), desc=f"batch {batch}", unit="turn", leave=False, dynamic_ncols=True):
        for side, call in sides.items():
            found[side].append(call(batch))
    return {side: runs[1:] for side, runs in found.items()}


def table(batch: int, found: dict[str, list[Measured]]) -> None:
    theirs, ours = found.values()
    print(f"| batch {batch} | {' | '.join(found)} | ratio |\n|---|---|---|---|")
    prefill = [np.array([run.result.prefill for run in side]) for side in (theirs, ours)]
    rate = [np.array([batch * (NEW - 1) / run.result.decode for run in side]) for side in (theirs, ours)]
    memory = [max(run.peak_mib for run in side) for side in (theirs, ours)]
    for name, (a, b), ratio in (
        ("prefill, s", prefill, prefill[0] / prefill[1]),
        ("decode, tokens/s", rate, rate[1] / rate[0]),
    ):
        print(f"| {name} | {spread(a)} | {spread(b)} | {spread(ratio)} |")
    print(f"| peak memory, MiB | {memory[0]:.0f} | {memory[1]:.0f} | {memory[0] / memory[1]:.2f} |")
    same = np.mean(theirs[0].result.tokens == ours[0].result.tokens)
    print(f"\n{same:.0%} of the tokens are the same.\n")


def spread(values: np.ndarray) -> str:
    return f"{statistics.median(values):.3g} ({values.min():.3g} to {values.max():.3g})"
