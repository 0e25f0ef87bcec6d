"""A trained model by its name: towers, parameters, preprocessing and tokenizer as one value."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from clip_jax.data.preprocess import Preprocess
from clip_jax.data.tokenizer import Tokenizer, load_tokenizer
from clip_jax.errors import CheckpointError
from clip_jax.models.two_tower import TwoTower
from clip_jax.models.variants import build_two_tower
from clip_jax.training import checkpoint


@dataclass(frozen=True)
class Loaded:
    """`params` are all the variables: the parameters and, where there are any, BatchNorm statistics."""

    model: TwoTower
    params: Mapping[str, Any]
    preprocess: Preprocess
    tokenizer: Tokenizer
    metadata: Mapping[str, Any]

    def encode_image(self, params: Mapping[str, Any], pixels: jax.Array) -> jax.Array:
        """Normalised pixels [B, S, S, 3] → embeddings [B, E], of unit length. Pure: to be jitted."""
        return self.model.apply(params, {"image": pixels})[0]

    def encode_text(self, params: Mapping[str, Any], ids: jax.Array) -> jax.Array:
        """Ids [B, L] → embeddings [B, E], of unit length. Pure: to be jitted."""
        return self.model.apply(params, {"text": ids})[1]


def load(spec: str) -> Loaded:
    """A checkpoint, or the newest one of a run's workdir.

    Raises CheckpointError where there is none, it is damaged, or its tokenizer is not the one it was trained with.
    """
    path = checkpoint.latest(Path(spec))
    metadata = checkpoint.metadata(path)
    config, model = metadata["config"], metadata["model"]
    tokenizer = load_tokenizer(config["data"]["tokenizer"])
    tokenizer.context_length = model["towers"]["text"]["context_length"]
    if tokenizer.digest() != model["tokenizer"]["sha256"]:
        raise CheckpointError(f"{path}: {config['data']['tokenizer']} is not the tokenizer that it was trained with")
    params = {"params": checkpoint.load(path, "params")}
    if (path / "state").is_dir():
        params |= checkpoint.load(path, "state")
    preprocess = model["preprocess"]
    return Loaded(
        model=build_two_tower(config["model"]),
        params=params,
        preprocess=Preprocess(preprocess["image_size"], tuple(preprocess["mean"]), tuple(preprocess["std"])),
        tokenizer=tokenizer,
        metadata=metadata,
    )
