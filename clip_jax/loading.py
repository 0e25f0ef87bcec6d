"""A trained model by its name: towers, parameters, preprocessing and tokenizer as one value."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data.preprocess import Preprocess
from clip_jax.data.tokenizer import Tokenizer, load_tokenizer
from clip_jax.errors import CheckpointError, ConfigError
from clip_jax.interop import published
from clip_jax.models.two_tower import TwoTower
from clip_jax.models.variants import build_two_tower
from clip_jax.training import checkpoint

_ONE_TOWER = "a {0} tower by itself; import it, and start a run from it (config.init.{0})"


@dataclass(frozen=True, eq=False)
class Loaded:
    """`params` are all the variables: the parameters and, where there are any, BatchNorm statistics.

    `metadata` is what the checkpoint says about itself; for published weights what one of them would say.
    """

    model: TwoTower
    params: Mapping[str, Any]
    preprocess: Preprocess
    tokenizer: Tokenizer
    metadata: Mapping[str, Any]

    @cached_property
    def encode_image(self) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
        """(params, normalised pixels [B, S, S, 3]) → embeddings [B, E], of unit length. Pure and jitted."""
        model = self.model
        return jax.jit(lambda params, pixels: model.apply(params, {"image": pixels})[0])

    @cached_property
    def encode_text(self) -> Callable[[Mapping[str, Any], jax.Array], jax.Array]:
        """(params, ids [B, L]) → embeddings [B, E], of unit length. Pure and jitted."""
        model = self.model
        return jax.jit(lambda params, ids: model.apply(params, {"text": ids})[1])


def load(
    spec: str | Path,
    *,
    image_size: int | None = None,
    preprocess: str | Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    allow: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Loaded:
    """A model, ready to embed images and texts.

    Args:
      spec: a checkpoint or a run's workdir (then its newest checkpoint); or published weights: `hf:DIR` (Hugging
        Face's CLIP and SigLIP), `openai:FILE`, `open_clip:FILE,CONFIG.json` or `open_clip:DIR`.
      mesh: over which parameters are sharded, by the default rules, on every process alike; by default they are
        on the first device.

    The others are for published weights:
      image_size: another resolution than theirs; the position embedding is resized.
      preprocess: "clip", "siglip" or the fields of `Preprocess`, where no file beside the weights says it.
      tokenizer: what `load_tokenizer` takes, where there is none beside the weights and it is not OpenAI's.
      allow: regular expressions for the start of names of tensors that may be missing or unused.

    Raises:
      CheckpointError: nothing there, damaged, of another architecture, or with another tokenizer than at training.
      ConfigError: something that the weights alone don't say is missing; the line says what to pass.
    """
    spec = str(spec)
    if published.is_published(spec):
        model = published.read(spec, image_size=image_size, preprocess=preprocess, allow=allow)
        if len(model.towers) < 2:
            raise ConfigError(f"{spec}: {_ONE_TOWER.format(*model.towers)}")
        where = published.find_tokenizer(model, Path(spec.partition(":")[2].partition(",")[0]), tokenizer)
        opened = published.open_tokenizer(where, model)
        towers = build_two_tower(model.config)
        return Loaded(
            model=towers,
            params=sharding.put_tree(model.variables, None if mesh is None else _shardings(towers, mesh)),
            preprocess=Preprocess(**model.preprocess),
            tokenizer=opened,
            metadata=published.metadata(model, opened, where),
        )
    if image_size or preprocess or tokenizer or allow:
        raise ConfigError(f"{spec}: image_size, preprocess, tokenizer and allow are for published weights only")
    return _load_checkpoint(checkpoint.latest(Path(spec)), mesh)


def _shardings(model: TwoTower, mesh: Mesh) -> Mapping[str, Any]:
    """Of every variable; nothing is allocated."""
    vision, text = model.vision, model.text
    shapes = {
        "image": jax.ShapeDtypeStruct((1, vision.image_size, vision.image_size, 3), jnp.float32),
        "text": jax.ShapeDtypeStruct((1, text.context_length), jnp.int32),
    }
    return sharding.tree_shardings(jax.eval_shape(model.init, jax.random.key(0), shapes), mesh)


def _load_checkpoint(path: Path, mesh: Mesh | None) -> Loaded:
    metadata = checkpoint.metadata(path)
    config, model = metadata["config"], metadata["model"]
    if not model.get("towers"):
        raise CheckpointError(f"{path}: a {model['family']} checkpoint; expected one with an image and a text tower")
    if len(model["towers"]) < 2:
        raise ConfigError(f"{path}: {_ONE_TOWER.format(*model['towers'])}")
    name = config["data"]["tokenizer"]
    beside = path.parent.parent / name  # an imported model's is copied there
    tokenizer = load_tokenizer(beside if beside.is_file() else name)
    tokenizer.context_length = model["towers"]["text"]["context_length"]
    if tokenizer.digest() != model["tokenizer"]["sha256"]:
        raise CheckpointError(f"{path}: {name} is not the tokenizer that it was trained with")
    towers = build_two_tower(config["model"])
    params, state = None, None
    if mesh is not None:
        state = dict(_shardings(towers, mesh))
        # A bias that only the loss uses is in the checkpoint and not in the config.
        params = defaultdict(lambda: sharding.replicated(mesh), state.pop("params"))
    variables = {"params": checkpoint.load(path, "params", params)}
    if (path / "state").is_dir():
        variables |= checkpoint.load(path, "state", state)
    check_finite(variables, path)
    return Loaded(
        model=towers,
        params=variables,
        preprocess=preprocess_of(model),
        tokenizer=tokenizer,
        metadata=metadata,
    )


def preprocess_of(model: Mapping[str, Any]) -> Preprocess:
    """From what a checkpoint says of its model; a field that an older one lacks has its default."""
    fields = model["preprocess"]
    known = ("image_size", "mean", "std", "interpolation", "resize_mode")
    return Preprocess(**{key: fields[key] for key in known if key in fields})


def check_finite(variables: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError, naming the first of the arrays that holds anything but finite numbers."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if not all(np.isfinite(shard.data).all() for shard in leaf.addressable_shards if shard.replica_id == 0):
            name = "/".join(str(key.key) for key in keys)
            raise CheckpointError(f"{path}: {name} holds values that are no finite numbers")
