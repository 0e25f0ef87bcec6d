"""Language models from a Hugging Face directory: config.json and weights, whole or in shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.errors import CheckpointError
from clip_jax.interop.imported import Fields
from clip_jax.interop.mapping import Report, Row, fill
from clip_jax.interop.tensors import Tensors, read_json, read_tensors
from flamingo_jax.interop.families import FAMILIES, Family
from flamingo_jax.models.language_model import DecoderSpec, LanguageModel

PyTree = Any
CONFIG = "config.json"


@dataclass(frozen=True)
class ImportedLanguageModel:
    """`fields` are `DecoderSpec`'s; `params` are `LanguageModel`'s, numpy arrays of the dtype they are stored in;
    `report` says what became of each tensor.
    """

    family: str
    fields: dict[str, Any]
    params: PyTree
    report: Report

    @property
    def spec(self) -> DecoderSpec:
        return DecoderSpec(**self.fields)


def read(directory: str | Path, *, allow: Sequence[str] = (), allow_nan: bool = False) -> ImportedLanguageModel:
    """Reads a directory with config.json and weights, as `clip_jax.interop.tensors.read_tensors` finds them.

    Args: `allow`, `allow_nan`: see `clip_jax.interop.mapping.fill` and `read_tensors`.

    Raises:
      CheckpointError: config.json is unreadable or asks for what `LanguageModel` does not do, or a file or tensor
        is missing, damaged, left over, or of another shape.
      ConfigError: the config's sizes do not fit each other.
    """
    directory = Path(directory)
    name, fields = model_fields(read_json(directory / CONFIG), str(directory / CONFIG))
    family, tensors = FAMILIES[name], read_tensors(directory, allow_nan=allow_nan)
    drop_tied_head(family, fields, tensors, str(directory))
    prefix = family.prefix if any(key.startswith(family.prefix) for key in tensors) else ""
    params, report = params_from(family.layout(prefix), fields, tensors, str(directory), allow, family.ignore)
    return ImportedLanguageModel(name, fields, params, report)


def params_from(
    rows: Sequence[Row],
    fields: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    label: str,
    allow: Sequence[str] = (),
    ignore: Sequence[str] = (),
) -> tuple[PyTree, Report]:
    """`LanguageModel`'s parameters, as stored, and what became of each tensor. Raises as `fill` does."""
    model = LanguageModel(DecoderSpec(**fields))

    def initial() -> PyTree:
        return model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    return fill(rows, initial, tensors, label, allow=allow, ignore=ignore)


def model_fields(config: Mapping[str, Any], label: str) -> tuple[str, dict[str, Any]]:
    """(the family's name, what config.json says as the fields of `DecoderSpec`).

    Raises CheckpointError for another architecture, and for what the model does not do.
    """
    values = Fields({key: value for key, value in config.items() if value is not None}, label)
    name = values.choice("model_type", {name: name for name in FAMILIES})
    return name, FAMILIES[name].fields(values)


def drop_tied_head(family: Family, fields: Mapping[str, Any], tensors: Tensors, label: str) -> None:
    """Some writers store a tied matrix twice. Raises CheckpointError where the two differ."""
    twice = fields["tied"] and family.head in tensors and family.embedding in tensors
    if twice and not np.array_equal(tensors.pop(family.head), tensors[family.embedding]):
        raise CheckpointError(f"{label}: {CONFIG} ties {family.head} to {family.embedding}, but they differ")
