"""How long a training step takes to trace, compile and read for v5e, by the model's depth: scanned, and unrolled.

Seconds of a CPU's time, so that what else the machine does is not counted; each in a process of its own, once.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

from clip_jax.progress import brief
from launch.benchmarking.rows import Result, Row, Settings, Skipped
from launch.benchmarking.turns import program

TOPOLOGY, FEWER, MORE = "v5e:2x2", 6, 24
MODELS = {"compile": "ViT-L/14", "compile-flamingo": "Flamingo-9B"}
GOAL = 1 / 1.15  # flat: 24 layers take at most 15 % longer than 6


def step_config(model: str, depth: int) -> Any:
    """The model's training step with towers, or a language model, of so many layers; small enough for 4 chips."""
    if model == "ViT-L/14":
        from configs.clip.common import clip_config

        config = clip_config(model)
        config.data.tokenizer = "openai"
        config.model.vision.layers = config.model.text.layers = depth
        config.model.vision.remat = config.model.text.remat = "full"
        config.batch_size = 64
    else:
        from configs.flamingo.flamingo_9b import get_config

        config = get_config("pages")
        config.model.language_model.layers = depth
        config.data.mixture.pages.batch_size = 4
    config.model.dtype = "bfloat16"
    return config


def compile_seconds(model: str, depth: int, unrolled: bool) -> Callable[[], float]:
    import jax

    jax.config.update("jax_platforms", "cpu")  # the compiler needs no TPU, and must not look for one
    jax.config.update("jax_enable_compilation_cache", False)
    if unrolled:  # what a loop over layers in Python would give the compiler
        scan = jax.lax.scan

        def unrolling(f: Any, init: Any, xs: Any = None, length: int | None = None, **options: Any) -> Any:
            leaves = jax.tree.leaves(xs)
            count = length if length is not None else leaves[0].shape[0]
            return scan(f, init, xs, length, **options | {"unroll": count if count <= MORE else 1})

        setattr(jax.lax, "scan", unrolling)  # noqa: B010
    from launch.planning import hardware
    from launch.planning.step import compile_step
    from launch.tasks import build_task

    config = step_config(model, depth)

    def run() -> float:
        start = time.process_time()
        compile_step(config, hardware.parse(TOPOLOGY), build_task)
        return time.process_time() - start

    return run


def rows(group: str, settings: Settings) -> Iterator[Result]:
    model = MODELS[group]
    name = f"compile time, {model} training step for {TOPOLOGY}"
    if importlib.util.find_spec("libtpu") is None:
        yield Skipped(name, "libtpu not installed (pip install -e '.[tpu]')")
        return
    if settings.quick:
        yield Skipped(name, "takes minutes, and --quick was given")
        return
    seconds = {}
    cases = ((FEWER, False), (MORE, False), (MORE, True))
    for depth, unrolled in brief(cases, total=len(cases), desc=group, unit="program"):
        with program(compile_seconds, model, depth, unrolled) as run:
            seconds[depth, unrolled] = [run().result]
        if unrolled:
            yield Row(f"{name}, {MORE} layers", "the same unrolled", seconds[MORE, False], seconds[MORE, True], 1.0)
        elif depth == MORE:
            yield Row(f"{name}, {MORE} layers", f"{FEWER} layers", seconds[MORE, False], seconds[FEWER, False], GOAL)
