"""Runs the frozen tower over a data set once: what `flamingo_jax.data.features` then reads instead of pixels."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from clip_jax import sharding
from clip_jax.data import transforms
from clip_jax.errors import ConfigError, RecordError
from flamingo_jax.data.features import tower_digest, write_features
from flamingo_jax.data.pages import decode
from flamingo_jax.training.flamingo_task import FlamingoTask


def prepare_features(
    task: FlamingoTask, stream: str, directory: Path, *, batch_size: int, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Writes the features of all images of a stream of the config's mixture, and returns their manifest.

    Images are resized and cropped as for evaluation; what training would change in them it can't any more. One that
    does not decode costs its page.

    Args:
      stream: its name in `data.mixture`; `batch_size`: images at a time; `dtype`: that of the stored features.

    Raises ConfigError for an unknown stream, a batch that the mesh does not divide or a task without a tower to read;
    DataError where the directory exists or no image decodes.
    """
    config = task.config
    pages, part = task.mixture.source(stream), config.data.mixture[stream]
    sharding.check_batch(batch_size, task.mesh)
    path = config.init.vision or config.init.get("flamingo", "")
    if not path:
        raise ConfigError("init.vision is empty: name the run or checkpoint that the tower is taken from")
    tower = task.tower(path)
    variables = tower | task.cast_frozen({"vision": tower["params"]})
    variables["params"] = variables.pop("vision")
    variables = jax.device_put(variables, sharding.replicated(task.mesh))
    where = sharding.batch_sharding(task.mesh)

    @jax.jit
    def look(variables: Any, image: jax.Array) -> jax.Array:
        vision = task.model.vision
        _, tokens = vision.apply(variables, task.inputs({"media": image})["media"])
        skipped = 0 if task.model.class_token else vision.num_prefix_tokens
        return tokens[:, skipped:].astype(jnp.dtype(dtype))

    def pixels(index: int) -> list[np.ndarray] | None:
        """The images or clips of a page, uint8 [F, S, S, 3] each; None where one does not decode."""
        try:
            page = pages[index]
            clips = [decode(raw, part.frames, page.key) for raw in page.media]
            return [np.stack([transforms.evaluation_image(f, task.image_size) for f in clip]) for clip in clips]
        except RecordError as error:
            tqdm.write(f"record left out: {error}", file=sys.stderr)  # stdout may be JSON
            return None

    def seen(images: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(images), batch_size):
            some = images[start : start + batch_size]
            padded = np.concatenate([some, np.zeros((batch_size - len(some), *some.shape[1:]), np.uint8)])
            parts.append(np.asarray(look(variables, jax.device_put(padded, where)))[: len(some)])
        return np.concatenate(parts)

    def features() -> Iterator[list[np.ndarray] | None]:
        with sharding.use_mesh(task.mesh), ThreadPoolExecutor(config.data.threads) as pool:
            for start in tqdm(range(0, len(pages), batch_size), desc="features", unit="batch", disable=None):
                found = list(pool.map(pixels, range(start, min(start + batch_size, len(pages)))))
                clips = [clip for page in found for clip in page or ()]
                rows = iter(
                    np.split(seen(np.concatenate(clips)), np.cumsum([len(c) for c in clips])[:-1]) if clips else ()
                )
                for page in found:
                    yield None if page is None else [next(rows) for _ in page]

    manifest = {"tower": tower_digest(tower), **task.features_of(stream)}
    return write_features(directory, features(), manifest)
