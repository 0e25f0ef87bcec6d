"""Flamingo's decoding beside transformers' on the same random IDEFICS: a 4-shot prompt, 32 greedy tokens, float32.

112 million parameters: a language model of width 512 with 12 layers and 3 gated blocks, a tower of width 384 with 12
layers and a resampler of 6. 5 images of 224² pixels, 160 tokens.
"""

import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from clip_jax.errors import ConfigError
from launch.benchmarking.turns import Measured, Run, program

IMAGES, SIZE, TOKENS, NEW, BATCHES = 5, 224, 160, 32, (1, 8)
IDEFICS: dict[str, Any] = dict(
    vocab_size=32000,
    additional_vocab_size=2,
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=12,
    num_attention_heads=8,
    cross_layer_interval=4,
    qk_layer_norms=True,
    use_resampler=True,
    alpha_initializer="ones",
    vision_config=dict(
        embed_dim=384, image_size=SIZE, patch_size=14, intermediate_size=1536, num_hidden_layers=12,
        num_attention_heads=6,
    ),
    perceiver_config=dict(
        use_resampler=True, resampler_n_latents=64, resampler_depth=6, resampler_n_heads=6, resampler_head_dim=64,
        qk_layer_norms_perceiver=True,
    ),
)  # fmt: skip


class Said(NamedTuple):
    """Seconds until the first token, and from there to the last one; and the tokens."""

    prefill: float
    decode: float
    tokens: np.ndarray


def inputs(batch: int) -> dict[str, np.ndarray]:
    """As IDEFICS takes them: each fifth of the tokens attends an image of its own."""
    rng = np.random.default_rng(0)
    latest = np.arange(TOKENS) * IMAGES // TOKENS
    return {
        "input_ids": rng.integers(3, IDEFICS["vocab_size"], (batch, TOKENS)),
        "attention_mask": np.ones((batch, TOKENS), np.int64),
        "pixel_values": rng.normal(size=(batch, IMAGES, 3, SIZE, SIZE)).astype(np.float32),
        "image_attention_mask": np.broadcast_to(
            latest[:, None] == np.arange(IMAGES), (batch, TOKENS, IMAGES)
        ).astype(np.int64),
    }  # fmt: skip


def import_peers() -> tuple[Any, Any]:
    """(torch, transformers), without torchvision: not needed here, and one that does not fit breaks transformers."""
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    import torch
    import transformers

    return torch, transformers


def save_weights(directory: Path) -> Run:
    """Random ones, by transformers. Returns the number of parameters when called."""
    torch, transformers = import_peers()
    torch.manual_seed(0)
    model = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**IDEFICS))
    model.save_pretrained(directory)
    return lambda: sum(parameter.numel() for parameter in model.parameters())


def transformers_run(directory: Path) -> Run:
    torch, transformers = import_peers()
    model: Any = transformers.IdeficsForVisionText2Text.from_pretrained(directory).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    prepared = {batch: {key: torch.tensor(x) for key, x in inputs(batch).items()} for batch in BATCHES}

    class Watch:
        """A transformers streamer: it is given the prompt, then every token as it is chosen."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(batch: int) -> Said:
        watch = Watch()
        with torch.inference_mode():
            said = model.generate(
                **prepared[batch], max_new_tokens=NEW, do_sample=False, pad_token_id=0, streamer=watch
            )
        return Said(watch.times[1] - watch.times[0], watch.times[NEW] - watch.times[1], said[:, TOKENS:].numpy())

    return run


def our_run(directory: Path) -> Run:
    import jax

    from flamingo_jax import decoding
    from flamingo_jax.interop.idefics import read_idefics
    from flamingo_jax.models.variants import build_flamingo

    imported = read_idefics(directory)
    model, variables = build_flamingo(imported.config), jax.device_put(decoding.unstack(imported.variables))
    del imported

    def arrays(batch: int) -> dict[str, np.ndarray]:
        given = inputs(batch)
        return {
            "media": given["pixel_values"].transpose(0, 1, 3, 4, 2)[:, :, None],
            "frame_mask": np.ones((batch, IMAGES, 1), bool),
            "text": given["input_ids"].astype(np.int32),
            "text_mask": given["attention_mask"].astype(bool),
            "media_mask": given["image_attention_mask"].astype(bool),
        }

    prepared = {batch: jax.device_put(arrays(batch)) for batch in BATCHES}

    def run(batch: int) -> Said:
        start = time.perf_counter()
        logits, cache = jax.block_until_ready(decoding.read_prompts(model, variables, prepared[batch], NEW - 1))
        read = time.perf_counter()
        said, _ = jax.block_until_ready(decoding.resume(model, variables, logits, cache, max_new_tokens=NEW))
        return Said(read - start, time.perf_counter() - read, np.asarray(said.tokens))

    return run


def main(rounds: int) -> None:
    """Prints the table. Raises ConfigError where the extra `peers` is not installed."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{name} is not installed; it comes with the extra: pip install -e '.[peers]'")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        with program(save_weights, directory) as count:
            parameters = count().result
        print(
            f"IDEFICS, {parameters / 1e6:.0f} million parameters, float32 on {os.cpu_count()} cores; {IMAGES} images, "
            f"{TOKENS} tokens, {NEW} new ones; median (least to most) of {rounds} turns\n"
        )
        with program(transformers_run, directory) as theirs, program(our_run, directory) as ours:
            for batch in BATCHES:
                table(batch, measure({"transformers": theirs, "flamingo_jax": ours}, batch, rounds))


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
