"""The first result after the start of Python: import, load, compile (from a warm cache) and embed one image."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from clip_jax.errors import UserError
from launch.benchmarking.clip import NEEDED, Ran, check_same, save
from launch.benchmarking.peers import import_peers
from launch.benchmarking.rows import OURS, Result, Row, Settings, Skipped, interleave
from launch.benchmarking.turns import program

NAME = "first result after start, ViT-B/32 and one image"


def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, 224, 224, 3)).astype(np.float32)


def ours(directory: str) -> np.ndarray:
    import jax.numpy as jnp

    from clip_jax.loading import load

    loaded = load(f"open_clip:{directory}")
    return np.asarray(loaded.encode_image(loaded.params, jnp.asarray(pixels())))


def theirs(directory: str) -> np.ndarray:
    torch, _ = import_peers()
    import open_clip
    from safetensors.torch import load_file

    model = open_clip.CLIP(**json.loads(Path(directory, "open_clip_config.json").read_text())["model_cfg"])
    model.load_state_dict(load_file(Path(directory, "open_clip_model.safetensors")))
    with torch.inference_mode():
        return model.eval().encode_image(torch.tensor(pixels().transpose(0, 3, 1, 2)), normalize=True).numpy()


def from_start(side: str, directory: Path) -> Ran:
    """One side in a new Python, measured from outside. Raises UserError where it fails."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(directory / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "launch.benchmarking.start", side, str(directory)]
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True)
    took = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"{NAME}: {side} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return Ran(took, np.array(json.loads(done.stdout.splitlines()[-1])))


def rows(settings: Settings) -> Iterator[Result]:
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        yield Skipped(NAME, f"{', '.join(absent)} not installed (pip install -e '.[peers]')")
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "weights"
        with program(save, directory, "ViT-B/32") as count:
            count()
        sides: dict[str, Callable[[], Ran]] = {
            OURS: partial(from_start, "ours", directory),
            "open_clip": partial(from_start, "theirs", directory),
        }
        found = interleave(sides, settings.rounds)
    check_same(NAME, {side: [run.output for run in runs] for side, runs in found.items()})
    times = {side: [run.seconds for run in runs[1:]] for side, runs in found.items()}
    yield Row(NAME, "open_clip", times[OURS], times["open_clip"], 1.0)


if __name__ == "__main__":
    print(json.dumps({"ours": ours, "theirs": theirs}[sys.argv[1]](sys.argv[2]).tolist()))
