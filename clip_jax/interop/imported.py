"""A published model as this project has it, and what reading its config and writing it out share."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from clip_jax.errors import CheckpointError, ConfigError
from clip_jax.interop import mapping
from clip_jax.interop.tensors import Tensors

PyTree = Any

# What models are fed with, where no file beside the weights says it: `preprocess="clip"`.
PREPROCESS: dict[str, dict[str, Any]] = {
    "clip": dict(
        mean=[0.48145466, 0.4578275, 0.40821073],
        std=[0.26862954, 0.26130258, 0.27577711],
        interpolation="bicubic",
        resize_mode="shorter side, centre crop",
    ),
    "siglip": dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", resize_mode="squash"),
    "imagenet": dict(
        mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], interpolation="bicubic", resize_mode="squash"
    ),
}
PREPROCESS_FIELDS = {"mean", "std", "interpolation", "resize_mode"}
IGNORED = (  # constants that state dicts carry beside the weights
    r"(input_resolution|context_length|vocab_size)$",
    r"(.*\.)?attn_mask$",
    r".*\.num_batches_tracked$",
    r".*\.position_ids$",
)


@dataclass(frozen=True)
class Imported:
    """`config` has `get_variant`'s shape, for a tower by itself without the other; `variables` are {"params": …,
    "batch_stats": … (ResNet)}, float32; `preprocess` has the fields of `clip_jax.data.preprocess.Preprocess`, none
    for a text tower; `report` says what became of each tensor.
    """

    config: dict[str, Any]
    variables: PyTree
    preprocess: dict[str, Any]
    report: mapping.Report
    source: str

    @property
    def towers(self) -> dict[str, dict[str, Any]]:
        return {name: self.config[name] for name in ("vision", "text") if name in self.config}

    @property
    def family(self) -> str:
        if len(self.towers) == 1:
            return next(iter(self.towers.values()))["kind"]
        return "siglip" if self.config["vision"].get("pool") == "map" else "clip"


class Fields:
    """A config file's object, whose values are checked as they are read; errors name the file and the field."""

    def __init__(self, values: Any, label: str):
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{label}: an object expected, not a {type(values).__name__}")
        self.values, self.label = values, label

    def integer(self, key: str, default: int | None = None, most: int = 10_000_000) -> int:
        value = self.values.get(key, default)
        if isinstance(value, list) and len(set(map(str, value))) == 1:  # a square's two sides
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise CheckpointError(f"{self.label}: {key} is {value!r}; a whole number from 1 to {most} expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -1e6 < value < 1e6:
            raise CheckpointError(f"{self.label}: {key} is {value!r}; a number expected")
        return float(value)

    def choice(self, key: str, known: Mapping[Any, Any], default: Any = None) -> Any:
        value = self.values.get(key, default)
        if not isinstance(value, str | int | None) or value not in known:
            expected = ", ".join(repr(k) for k in known)
            raise CheckpointError(f"{self.label}: {key} is {value!r}; expected one of {expected}")
        return known[value]

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.label}: {key} is {value!r}; true or false expected")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Raises CheckpointError where a field is there and says anything else."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            expected = " or ".join(map(repr, allowed)) or "none"
            raise CheckpointError(f"{self.label}: {key} is {value!r}; only {expected} is supported")

    def object(self, key: str) -> "Fields":
        return Fields(self.values.get(key) or {}, f"{self.label}: {key}")

    def refuse_others(self, known: Sequence[str], harmless: Mapping[str, Any]) -> None:
        """Raises CheckpointError for a field that would change the model in a way that isn't supported."""
        for key, value in self.values.items():
            if key not in known and value not in (None, False) and value != harmless.get(key):
                raise CheckpointError(f"{self.label}: {key} {value!r} is not supported")


def chosen_preprocess(
    found: Mapping[str, Any] | None, given: str | Mapping[str, Any] | None, image_size: int, label: str
) -> dict[str, Any]:
    """The fields of `Preprocess`: those given, else those found beside the weights.

    Raises ConfigError where neither says them.
    """
    fields: Mapping[str, Any] | None = found
    if isinstance(given, str):
        if given not in PREPROCESS:
            raise ConfigError(f"preprocess {given!r}: expected one of {', '.join(PREPROCESS)}, or the fields")
        fields = PREPROCESS[given]
    elif given is not None:
        fields = given
    if fields is None:
        raise ConfigError(
            f"{label}: nothing there says how images are prepared; pass preprocess={' or '.join(PREPROCESS)}, "
            f"or the fields {', '.join(sorted(PREPROCESS_FIELDS))}"
        )
    if unknown := sorted(set(fields) ^ PREPROCESS_FIELDS):
        raise ConfigError(f"preprocess: {unknown[0]}; expected the fields {', '.join(sorted(PREPROCESS_FIELDS))}")
    return {"image_size": image_size, **{key: fields[key] for key in sorted(PREPROCESS_FIELDS)}}


def import_model(
    rows: Sequence[mapping.Row],
    config: dict[str, Any],
    tensors: Tensors,
    label: str,
    *,
    position_key: str,
    preprocess: dict[str, Any],
    allow: Sequence[str],
    source: str,
) -> Imported:
    """Maps a state dict into the model of a config, its position embedding resized to the config's image size."""
    vision = config["vision"]
    if position_key in tensors and vision["kind"] == "vit" and tensors[position_key].ndim == 2:
        resized = mapping.resize_positions(
            tensors[position_key], vision["image_size"] // vision["patch_size"], 0 if vision["pool"] == "map" else 1
        )
        tensors = tensors | {position_key: resized}
    variables, report = mapping.to_ours(rows, config, tensors, label, allow=allow, ignore=IGNORED)
    return Imported(config, variables, preprocess, report, source)


def write_model(path: Path, weights: tuple[str, Mapping[str, np.ndarray]], files: Mapping[str, Any]) -> None:
    """A directory of one safetensors file and JSON files, complete or not there at all.

    Raises ConfigError where something stands there already.
    """
    if path.exists():
        raise ConfigError(f"{path}: exists already; name a new directory")
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(dict(weights[1]), temporary / weights[0], metadata={"format": "pt"})
        for name, value in files.items():
            (temporary / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def model_config(
    vision: dict[str, Any], text: dict[str, Any], embed_dim: int, activation: str, **rest: Any
) -> dict[str, Any]:
    """A config of `get_variant`'s shape."""
    if vision["kind"] == "vit":
        vision = {"pool": "class", "patch_dropout": 0.0, "remat": "none"} | vision
    return dict(
        vision=vision, text={"remat": "none"} | text, embed_dim=embed_dim, activation=activation, dtype="float32",
        **rest,
    )  # fmt: skip


def require(condition: bool, reason: str) -> None:
    """Raises ConfigError for a model that a format has no words for."""
    if not condition:
        raise ConfigError(reason)
