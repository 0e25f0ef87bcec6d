"""Whether a tower of another run, or of imported weights, is the one that a config describes."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import ml_collections

from clip_jax.data.tokenizer import Tokenizer
from clip_jax.errors import ConfigError
from clip_jax.models.variants import build_text, build_vision
from clip_jax.training import checkpoint

# Fields of a tower that may differ: they are no part of what it computes, say where Flamingo looks at it, or, by
# kind, no weight depends on them.
COSTS = ("dtype", "remat", "patch_dropout", "drop_path", "norm_tokens")
FREE = {"nfnet": ("image_size",), "bert": ("context_length",)}


def compare(what: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], but: tuple[str, ...] = ()) -> None:
    """Raises ConfigError for the first field of a checkpoint that is not the config's."""
    for key in sorted((theirs.keys() | ours.keys()) - set(but)):
        a, b = (tuple(x) if isinstance(x := side.get(key), list | tuple) else x for side in (theirs, ours))
        same = math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float) else a == b
        if not same:
            raise ConfigError(f"{what}: {key} is {a!r} in the checkpoint; this config expects {b!r}")


def check_vision(config: ml_collections.ConfigDict, path: str) -> None:
    """Compares the tower of the run or checkpoint at `path` with the config: its sizes, activation, preprocessing.

    Raises ConfigError for the first difference and where there is no such tower; CheckpointError where there is
    no checkpoint.
    """
    model, data = config.model, config.data
    theirs = _their_model("vision", path)
    ours = {"embed_dim": model.embed_dim, "activation": model.activation}
    compare("init.vision", {key: theirs[key] for key in ours}, ours)
    compare("init.vision", {"kind": theirs["towers"]["vision"]["kind"]}, {"kind": model.vision.kind})
    found, expected = (_fields(build_vision(tower)) for tower in (_described(theirs, "vision"), model))
    compare("init.vision", found, expected, COSTS + FREE.get(model.vision.kind, ()))
    preprocess = {"mean": list(data.mean), "std": list(data.std)}
    compare("init.vision", {key: theirs["preprocess"][key] for key in preprocess}, preprocess)


def check_text(config: ml_collections.ConfigDict, path: str, tokenizer: Tokenizer) -> None:
    """The same of a text tower: its sizes, activation and tokenizer."""
    model = config.model
    theirs = _their_model("text", path)
    ours = {"embed_dim": model.embed_dim, "activation": model.activation}
    compare("init.text", {key: theirs[key] for key in ours}, ours)
    kind = model.text.get("kind", "gpt")
    compare("init.text", {"kind": theirs["towers"]["text"].get("kind", "gpt")}, {"kind": kind})
    found, expected = (_fields(build_text(tower)) for tower in (_described(theirs, "text"), model))
    either = ("end_id",) if None in (found.get("end_id"), expected.get("end_id")) else ()  # None: the highest id
    compare("init.text", found, expected, COSTS + FREE.get(kind, ()) + either)
    compare("init.text", {"tokenizer.sha256": theirs["tokenizer"]["sha256"]}, {"tokenizer.sha256": tokenizer.digest()})


def _their_model(tower: str, path: str) -> Mapping[str, Any]:
    """What a checkpoint says of its model."""
    found = checkpoint.metadata(checkpoint.latest(Path(path))).get("model", {})
    if tower not in found.get("towers", {}):
        family = found.get("family", "foreign")
        raise ConfigError(f"init.{tower}={path}: a {family} checkpoint, without a tower `{tower}`")
    return found


def _described(model: Mapping[str, Any], tower: str) -> dict[str, Any]:
    """A checkpoint's tower as a config of `get_variant`'s shape."""
    return {
        tower: model["towers"][tower],
        "embed_dim": model["embed_dim"],
        "activation": model["activation"],
        "dtype": "float32",
    }


def _fields(module: nn.Module) -> dict[str, Any]:
    """What a tower is built with, defaults included."""
    fields = {f.name: getattr(module, f.name) for f in dataclasses.fields(module) if f.name not in ("parent", "name")}
    if "mlp_width" in fields:
        fields["mlp_width"] = fields["mlp_width"] or 4 * fields["width"]
    return fields
