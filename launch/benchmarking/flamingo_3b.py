"""Flamingo-3B by itself, of its own config: what share of a GPU its training step and its decoding reach."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from launch.benchmarking import decode
from launch.benchmarking.clip import turn_of
from launch.benchmarking.limits import gpu_peak, matmul_rate, on_device, reading_rate
from launch.benchmarking.peers import IMAGES, NEW, TOKENS
from launch.benchmarking.rows import OURS, Row, Settings, interleave, seconds
from launch.benchmarking.turns import program

NAME, PAGES = "Flamingo-3B, bf16", 8
NAMES = tuple(f"{NAME}: {what}" for what in ("training step", "prefill", "decode"))


def our_step(arg: str, pages: int) -> Callable[..., Any]:
    """A turn of steps on so many pages of `configs/flamingo/flamingo_3b.py:ARG`, random weights; or, called with
    "flops", the products that the gradient asks for.
    """
    import jax

    from clip_jax import sharding
    from clip_jax.training import state as train_state
    from clip_jax.training.optimizer import make_optimizer
    from configs.flamingo.flamingo_3b import get_config
    from launch.planning.stand_in import without_data
    from launch.planning.step import model_flops
    from launch.tasks import build_task

    config = get_config(arg)
    config.data.mixture = {"pages": config.data.mixture.pages}
    config.data.mixture.pages.batch_size = pages
    with without_data(config) as config:
        flops = model_flops(config, build_task, jax.devices()[:1])
        mesh, rules = sharding.make_mesh({}, jax.devices()[:1]), sharding.rules_of(config.sharding_rules)
        task = build_task(config, mesh)
        stream = task.streams()["pages"]
        elements = [stream.element(i) for i in range(pages)]
        keys = [key for key in elements[0] if key != "rejected"]
        batch = {"pages": {key: np.stack([element[key] for element in elements]) for key in keys}}
        with sharding.use_mesh(mesh, rules):
            axes = sharding.logical_axes(jax.eval_shape(task.init, jax.random.key(0))[0])
            optimizer = make_optimizer(config.optimizer, config.steps, axes)
            create = train_state.create_fn(task, optimizer, config.frozen)
            _, shardings = train_state.abstract_state(create, mesh, rules)
            create_all = jax.jit(lambda key: sharding.unbox(create(key)), out_shardings=shardings)
            held = [create_all(jax.random.key(0))]
            function = train_state.train_step_fn(task, optimizer, config.seed, config.guard.spike_factor)
            step: Any = train_state.jit_train_step(function, shardings, mesh)
            compiled = step.lower(held[0], batch).compile()
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))

    def one_step() -> Any:
        held[0], metrics = jax.block_until_ready(compiled(held[0], batch))
        return metrics["loss"]

    return lambda what="turn": flops if what == "flops" else turn_of(one_step)


def our_decoding(arg: str, batches: Sequence[int]) -> Callable[..., Any]:
    """As `decode.our_run`, of `configs/flamingo/flamingo_3b.py:ARG` with random weights in bfloat16."""
    import jax
    import jax.numpy as jnp

    from clip_jax import sharding
    from configs.flamingo.flamingo_3b import get_config
    from flamingo_jax import decoding
    from flamingo_jax.models.variants import build_flamingo

    config = get_config(arg).model
    model, size, vocab_size = build_flamingo(config), config.vision.image_size, config.language_model.vocab_size

    def inputs(batch: int) -> Any:
        rng = np.random.default_rng(0)
        latest = np.arange(TOKENS) // (TOKENS // IMAGES)  # every image opens a fifth of the prompt
        return jax.device_put(
            {
                "media": rng.normal(size=(batch, IMAGES, 1, size, size, 3)).astype(np.float32),
                "frame_mask": np.ones((batch, IMAGES, 1), bool),
                "text": rng.integers(vocab_size, size=(batch, TOKENS), dtype=np.int32),
                "text_mask": np.ones((batch, TOKENS), bool),
                "media_mask": np.tile(latest[:, None] == np.arange(IMAGES), (batch, 1, 1)),
            }
        )

    def variables_of(batch: Any) -> Any:
        variables = sharding.unbox(model.init(jax.random.key(0), batch))
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)

    prepared = {batch: inputs(batch) for batch in batches}
    variables = decoding.unstack(jax.jit(variables_of)(prepared[batches[0]]))
    return lambda batch, turn=True: (decode.speak if turn else decode.needs)(model, variables, prepared[batch])


def rows(settings: Settings, device: str = "gpu") -> Iterator[Row]:
    """Beside what the device itself reaches; `quick` is the same model, shrunk."""
    arg, pages, batches = ("debug", 2, (1,)) if settings.quick else ("pages", PAGES, decode.BATCHES)
    with program(on_device, device, our_step, arg, pages) as run:
        times, flops = seconds(interleave({OURS: run}, settings.rounds)[OURS]), run("flops").result
    yield Row(f"{NAMES[0]}, {pages} pages: MFU", "the GPU's peak", times, [flops / gpu_peak()] * len(times), None)
    found = {}
    with program(on_device, device, our_decoding, arg, batches) as run:
        for batch in batches:
            turns = interleave({OURS: run}, settings.rounds, batch)[OURS][1:]
            found[batch] = [turn.result for turn in turns], run(batch, False).result
    for batch, (said, needs) in found.items():
        prefill = needs.flops / matmul_rate(device, "bfloat16")
        reading = (NEW - 1) * needs.bytes / reading_rate(device, "bfloat16")
        for name, peer, times, least in (
            (NAMES[1], "bare matrix products", [turn.prefill for turn in said], prefill),
            (NAMES[2], "reading the weights for each token", [turn.decode for turn in said], reading),
        ):
            yield Row(f"{name}, 4 shots, batch {batch}", peer, times, [least] * len(times), None)
