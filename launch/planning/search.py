"""Tries meshes, rematerialisation and micro-batches of a config on a topology, and ranks what fits."""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_collections
from tqdm import tqdm

from clip_jax.errors import ConfigError
from clip_jax.models.layers import REMAT_POLICIES
from clip_jax.sharding import MESH_AXES
from launch.planning.hardware import Topology
from launch.planning.report import gib, remat_keys, seconds, to_json
from launch.planning.step import BuildTask, Plan, compile_step


@dataclass(frozen=True)
class Result:
    overrides: dict[str, Any]  # key of the config → value
    plan: Plan

    def to_json(self, price: float | None) -> dict[str, Any]:
        return {"overrides": self.overrides, **to_json(self.plan, price)}


def search(config: ml_collections.ConfigDict, topology: Topology, build_task: BuildTask) -> list[Result]:
    """All results, those that fit first, the fastest of them first; Ctrl-C ends it with those that there are."""
    found: list[Result] = []
    choices = [mesh | policy for mesh in mesh_shapes(config, topology) for policy in remat_choices(config)]
    try:
        for choice in tqdm(choices, desc="search", unit="choice", dynamic_ncols=True, disable=None):
            for result in until_it_fits(config, choice, topology, build_task):
                found.append(result)
                tqdm.write(line(result), file=sys.stdout)
    except KeyboardInterrupt:
        tqdm.write("stopped", file=sys.stdout)
    return sorted(found, key=order)


def until_it_fits(
    config: ml_collections.ConfigDict, choice: dict[str, Any], topology: Topology, build_task: BuildTask
) -> Iterator[Result]:
    """Micro-batches are doubled from 1 until the step fits: more would only be slower."""
    for micro in micro_batch_choices(config):
        changed = ml_collections.ConfigDict(config.to_dict())
        changed.update_from_flattened_dict(choice | micro)
        try:
            result = Result(choice | micro, compile_step(changed, topology, build_task))
        except ConfigError as error:  # a batch that does not divide, say
            tqdm.write(f"{flags(choice | micro)}: {error}", file=sys.stdout)
            return
        yield result
        if result.plan.fits:
            return


def flags(overrides: dict[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in overrides.items())


def order(result: Result) -> tuple[bool, float]:
    costs = result.plan.costs
    return (True, result.plan.memory.peak) if costs is None else (not result.plan.fits, costs.step_seconds)


def mesh_shapes(config: ml_collections.ConfigDict, topology: Topology) -> Iterator[dict[str, int]]:
    """The config's own; parameters over all devices; over some, replicated beyond; each layer over 2 and 4 devices."""
    devices = topology.chips * topology.chip.devices
    own = [config.mesh.get(axis, 1) for axis in MESH_AXES]
    left = devices // abs(math.prod(own))  # for the axis of size -1
    shapes = [tuple(left if size == -1 else size for size in own)]
    shapes += [(1, devices, 1), (devices, 1, 1), (devices // 8, 8, 1), (1, devices // 2, 2), (1, devices // 4, 4)]
    for shape in dict.fromkeys(shapes):
        if math.prod(shape) == devices:
            yield {f"mesh.{axis}": size for axis, size in zip(MESH_AXES, shape, strict=True)}


def remat_choices(config: ml_collections.ConfigDict) -> Iterator[dict[str, Any]]:
    """One policy for all towers at a time; where all there is to say is yes or no, those two."""
    keys = remat_keys(config)
    policies = ("none", *reversed(REMAT_POLICIES))
    if all(isinstance(value, bool) for value in keys.values()):
        policies = ("none", "full")
    for policy in policies if keys else ("",):
        yield {k: (policy != "none") if isinstance(v, bool) else policy for k, v in keys.items()}


def micro_batch_choices(config: ml_collections.ConfigDict) -> Iterator[dict[str, int]]:
    if "micro_batches" not in config or config.model.vision.kind == "resnet":
        yield {}
        return
    for doublings in range(6):
        yield {"micro_batches": 2**doublings}


def line(result: Result) -> str:
    plan = result.plan
    if plan.costs is None:
        return f"{gib(plan.memory.peak):>14}  {'does not fit':24}  {flags(result.overrides)}"
    return (f"{gib(plan.memory.peak):>14}  {seconds(plan.costs.step_seconds):>9}  MFU {plan.mfu:6.1%}  "
            f"  {flags(result.overrides)}")  # fmt: skip


def to_text(results: list[Result]) -> str:
    fitting = [result for result in results if result.plan.fits]
    return "\n".join([f"{len(fitting)} of {len(results)} fit, the fastest first:", *map(line, fitting)])
