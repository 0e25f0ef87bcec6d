"""The other side of `decode.py` for IDEFICS's design: transformers itself."""

from pathlib import Path
from typing import Any

import numpy as np

from launch.benchmarking.peers import IMAGES, NEW, SIZE, TOKENS, Said, Watch, import_peers

V = 32000


def _config(width: int, hidden: int, heads: int, vision: int) -> dict[str, Any]:
    """A language model of `width` with 12 layers and 3 gated blocks; a tower of `vision` with 12, a resampler of 6."""
    return dict(
        vocab_size=V,
        additional_vocab_size=2,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=12,
        num_attention_heads=heads,
        cross_layer_interval=4,
        qk_layer_norms=True,
        use_resampler=True,
        alpha_initializer="ones",
        vision_config=dict(
            embed_dim=vision, image_size=SIZE, patch_size=14, intermediate_size=4 * vision, num_hidden_layers=12,
            num_attention_heads=vision // 64,
        ),
        perceiver_config=dict(
            use_resampler=True, resampler_n_latents=64, resampler_depth=6, resampler_n_heads=vision // 64,
            resampler_head_dim=64, qk_layer_norms_perceiver=True,
        ),
    )  # fmt: skip


SIZES = {"small": _config(512, 1376, 8, 384), "medium": _config(1024, 2752, 16, 512)}  # some 112 and 309 M parameters


def inputs(batch: int) -> dict[str, np.ndarray]:
    """As IDEFICS takes them: each fifth of the tokens attends an image of its own."""
    rng = np.random.default_rng(0)
    latest = np.arange(TOKENS) * IMAGES // TOKENS
    seen = np.broadcast_to(latest[:, None] == np.arange(IMAGES), (batch, TOKENS, IMAGES))
    return {
        "input_ids": rng.integers(3, V, (batch, TOKENS)),
        "attention_mask": np.ones((batch, TOKENS), np.int64),
        "pixel_values": rng.normal(size=(batch, IMAGES, 3, SIZE, SIZE)).astype(np.float32),
        "image_attention_mask": seen.astype(np.int64),
    }


def save_weights(directory: Path, config: dict[str, Any]) -> Any:
    """Random ones. Returns the number of parameters when called."""
    torch, transformers = import_peers()
    torch.manual_seed(0)
    model = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**config))
    model.save_pretrained(directory)
    return lambda: sum(parameter.numel() for parameter in model.parameters())


def peer_run(directory: Path, batches: tuple[int, ...]) -> Any:
    torch, transformers = import_peers()
    model = transformers.IdeficsForVisionText2Text.from_pretrained(directory).eval()
    model.generation_config.eos_token_id = None
    prepared = {batch: {key: torch.tensor(x) for key, x in inputs(batch).items()} for batch in batches}

    def run(batch: int) -> Said:
        watch = Watch()
        with torch.inference_mode():
            said = model.generate(
                **prepared[batch], max_new_tokens=NEW, do_sample=False, pad_token_id=0, streamer=watch
            )  # fmt: skip
        return watch.said(said[:, TOKENS:].numpy())

    return run


def read(directory: Path) -> Any:
    from flamingo_jax.interop.idefics import read_idefics

    return read_idefics(directory)


def our_batch(batch: int) -> dict[str, np.ndarray]:
    given = inputs(batch)
    return {
        "media": given["pixel_values"].transpose(0, 1, 3, 4, 2)[:, :, None],
        "frame_mask": np.ones((batch, IMAGES, 1), bool),
        "text": given["input_ids"].astype(np.int32),
        "text_mask": given["attention_mask"].astype(bool),
        "media_mask": given["image_attention_mask"].astype(bool),
    }
