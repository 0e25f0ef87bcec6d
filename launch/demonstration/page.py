"""The page as a whole, and its server: bound to one address, with nothing on it that can be named from outside."""

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from starlette.middleware import Middleware

from clip_jax.data.images import Images
from clip_jax.data.transforms import decode
from clip_jax.errors import ConfigError, RecordError
from launch.demonstration import look
from launch.demonstration.answering import Flamingo
from launch.demonstration.clip_tabs import clip_tabs
from launch.demonstration.finding import Clip
from launch.demonstration.flamingo_tabs import flamingo_tabs
from launch.demonstration.uploads import Guard, Limits

LABELS, QUERY, QUESTION = "apple, banana, cat, dog, car, house, face, heart", "red apple", "which colour is this?"
TRIES = 20


def build(clip: Clip | None, flamingo: Flamingo | None, examples: Images, about: str) -> gr.Blocks:
    """`about`: a line below the title. `examples`: pictures that a visitor who has none at hand is shown."""
    example = example_of(examples)
    with gr.Blocks(title="CLIP and Flamingo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(f"<h1>CLIP and Flamingo</h1><small>{html.escape(about)}</small>", elem_classes="title")
        with gr.Tabs():
            if clip is not None:
                clip_tabs(clip, example, LABELS, QUERY)
            if flamingo is not None:
                flamingo_tabs(flamingo, example, QUESTION)
    return page.queue(max_size=100, api_open=False)


def example_of(images: Images, side: int = 512) -> Callable[[], Any]:
    """A picture drawn at random, made small."""
    rng = np.random.default_rng()

    def example() -> Any:
        for _ in range(TRIES):
            try:
                key, data = images[int(rng.integers(len(images)))]
                image = decode(data, key)
            except RecordError:
                continue
            image.thumbnail((side, side))
            return image
        return None

    return example


def serve(page: gr.Blocks, folder: Path, limits: Limits, host: str, port: int) -> str:
    """Starts the server in a thread; returns its address. `folder`: where uploads lie.

    Raises ConfigError where the address can't be had.
    """
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, inbrowser=False,
            max_file_size=limits.size, allowed_paths=[], ssr_mode=False, mcp_server=False, pwa=False,
            enable_monitoring=False, run_history=False, footer_links=[], theme=look.theme(), css=look.CSS,
            app_kwargs={"middleware": [Middleware(Guard, folder=folder, limits=limits)]},
        )  # fmt: skip
    except OSError:
        raise ConfigError(f"--host {host} --port {port}: taken, or no address of this machine; name another") from None
    return address
