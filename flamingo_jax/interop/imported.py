"""A published Flamingo as this project has it, and what reading and writing one share."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from clip_jax.errors import ConfigError
from clip_jax.interop.mapping import Report
from flamingo_jax.models.variants import build_flamingo

PyTree = Any
# What no weight depends on: where a model computes, how it was born and trained.
COSTS = ("dtype", "remat", "patch_dropout", "embedding_std", "parent", "name")


@dataclass(frozen=True)
class ImportedFlamingo:
    """`config` has `flamingo_jax.models.variants.get_variant`'s shape, `variables` are the model's, numpy arrays;
    `preprocess` has the fields of `clip_jax.data.preprocess.Preprocess`; `report` says what became of each tensor of
    the checkpoint, `parts` of those of the models that it was trained around. `family`: of `conventions`.
    """

    config: dict[str, Any]
    variables: PyTree
    preprocess: dict[str, Any]
    report: Report
    family: str
    parts: Mapping[str, Report] = field(default_factory=dict)

    @property
    def whole_report(self) -> Report:
        """Of all tensors of all files."""
        whole = Report(**{one.name: getattr(self.report, one.name).copy() for one in dataclasses.fields(Report)})
        for name, report in self.parts.items():
            whole.add(name, report)
        return whole


def initial_variables(config: Mapping[str, Any]) -> PyTree:
    """The variables of a Flamingo of `get_variant`'s shape, boxed, drawn from seed 0."""
    size, frames = config["vision"]["image_size"], config["resampler"]["frames"]
    batch = {
        "media": jnp.zeros((1, 1, frames, size, size, 3)),
        "frame_mask": jnp.ones((1, 1, frames), bool),
        "text": jnp.zeros((1, 2), jnp.int32),
        "text_mask": jnp.ones((1, 2), bool),
        "media_mask": jnp.ones((1, 2, 1), bool),
    }
    return build_flamingo(config).init(jax.random.key(0), batch)


def initial_params(config: Mapping[str, Any]) -> PyTree:
    return initial_variables(config)["params"]


def require_same(config: Mapping[str, Any], expressible: Mapping[str, Any], family: str) -> None:
    """Raises ConfigError for the first field in which a model differs from the one that a format has words for."""
    found = _difference(*(build_flamingo(_filled(one)) for one in (config, expressible)))
    if found:
        name, ours, theirs = found
        raise ConfigError(f"{family} has no words for this model: its {name} is {ours!r}, there it is {theirs!r}")


def _filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """With the widths that are four times another where none is given."""
    vision, gated = dict(config["vision"]), dict(config.get("gated", {}))
    if vision["kind"] == "vit":
        vision["mlp_width"] = vision.get("mlp_width") or 4 * vision["width"]
    gated["mlp_width"] = gated.get("mlp_width") or 4 * config["language_model"]["width"]
    return {**config, "vision": vision, "gated": gated}


def _difference(ours: Any, theirs: Any, path: str = "") -> tuple[str, Any, Any] | None:
    if not dataclasses.is_dataclass(ours) or type(ours) is not type(theirs):
        return None if ours == theirs else (path.removeprefix("."), _named(ours), _named(theirs))
    names = (one.name for one in dataclasses.fields(ours) if one.name not in COSTS)
    found = (_difference(getattr(ours, name), getattr(theirs, name), f"{path}.{name}") for name in names)
    return next((one for one in found if one), None)


def _named(value: Any) -> Any:
    return type(value).__name__ if isinstance(value, nn.Module) else value
