"""A plan as text and as JSON, and what to try where it does not fit."""

import math
from dataclasses import asdict
from typing import Any

import ml_collections

from launch.planning.hardware import GiB
from launch.planning.step import Costs, Plan

KINDS = {
    "trained_parameters": "trained parameters",
    "frozen_parameters": "frozen parameters",
    "optimizer_state": "optimizer state",
    "model_state": "statistics",
    "batch": "batch",
    "padding": "padding of these",
    "program": "program",
    "temporaries": "activations, gradients",
}


def to_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """All figures of a plan, in bytes, seconds and operations; those of a step are null where it does not fit."""
    costs, chip = plan.costs, plan.topology.chip
    by_kind: dict[str, float] = {}
    for part in costs.traffic if costs else ():
        by_kind[part.kind] = by_kind.get(part.kind, 0) + part.bytes
    known: dict[str, Any] = dict.fromkeys(STEP_FIGURES)
    if costs:
        known = {
            "flops_per_chip": costs.flops,
            "hbm_traffic_bytes": costs.hbm_traffic,
            "collective_bytes": by_kind,
            "collectives": [asdict(part) for part in costs.traffic],
            "compute_seconds": costs.compute_seconds,
            "hbm_seconds": costs.hbm_seconds,
            "local_seconds": costs.local_seconds,
            "interconnect_seconds": costs.interconnect_seconds,
            "compiler_seconds": costs.compiler_seconds or None,
            "uncounted_loops": costs.uncounted_loops,
            "step_seconds": costs.step_seconds,
            "limited_by": costs.limited_by,
            "mfu": plan.mfu,
            "examples_per_second": plan.examples_per_second,
            "chip_hours": plan.chip_hours,
            "dollars": plan.chip_hours * (chip.price if price is None else price),
        }
    return {
        "topology": plan.topology.name,
        "chips": plan.topology.chips,
        "mesh": plan.mesh,
        "batch": plan.batch,
        "steps": plan.steps,
        "trained_parameters": plan.trained,
        "frozen_parameters": plan.frozen,
        "fits": plan.fits,
        "hbm_bytes": chip.hbm_bytes,
        "peak_bytes": plan.memory.peak,
        "memory_bytes": asdict(plan.memory),
        "model_flops_per_chip": plan.model_flops,
        **known,
        "compile_seconds": plan.compile_seconds,
    }


STEP_FIGURES = (
    "flops_per_chip", "hbm_traffic_bytes", "collective_bytes", "collectives", "compute_seconds", "hbm_seconds",
    "local_seconds", "interconnect_seconds", "compiler_seconds", "uncounted_loops", "step_seconds", "limited_by",
    "mfu", "examples_per_second", "chip_hours", "dollars",
)  # fmt: skip


def to_text(plan: Plan, price: float | None = None) -> str:
    """The plan as a page."""
    chip, memory = plan.topology.chip, plan.memory
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    batch = " + ".join(f"{size:,} {name}" for name, size in plan.batch.items())
    lines = [
        f"{plan.topology.name}: {plan.topology.chips:,} chips, mesh {mesh}; a step of {batch}",
        f"parameters      {plan.trained:,} trained, {plan.frozen:,} frozen",
        f"memory          {gib(memory.peak)} of {gib(chip.hbm_bytes)} on each chip: "
        + ("fits" if plan.fits else "DOES NOT FIT"),
    ]
    for kind, amount in asdict(memory).items():
        if amount:
            lines.append(f"  {KINDS[kind]:24}{gib(amount):>12}")
    if plan.costs:
        lines += costs_lines(plan, plan.costs, chip.price if price is None else price)
    lines.append(f"(compiled in {plan.compile_seconds:.0f} s of CPU time)")
    return "\n".join(lines)


def costs_lines(plan: Plan, costs: Costs, price: float) -> list[str]:
    chip = plan.topology.chip
    lines = [
        f"operations      {costs.flops / 1e12:,.1f} TFLOP on each chip; the gradient asks for "
        f"{plan.model_flops / 1e12:,.1f}: {costs.flops / plan.model_flops:.3f} times",
        f"memory traffic  {costs.hbm_traffic / 1e9:,.1f} GB on each chip",
        f"interconnect    {sum(t.bytes for t in costs.traffic) / 1e9:,.2f} GB sent by each chip",
    ]
    for part in costs.traffic:
        if part.bytes >= 1e6:
            network = ", between slices" if part.between_slices else ""
            lines.append(
                f"  {part.kind:20}{part.bytes / 1e6:>10,.0f} MB{1e3 * part.seconds:>9,.1f} ms  {part.purpose}{network}"
            )
    lines += [
        f"step            {seconds(costs.step_seconds)} by the roofline, limited by {costs.limited_by}",
        f"  {seconds(costs.compute_seconds):>9} of the matrix unit, {seconds(costs.hbm_seconds)} of memory traffic: "
        f"{seconds(costs.local_seconds)}, taking for each operation the longer",
        f"  {seconds(costs.interconnect_seconds):>9} of transfers, hidden behind that",
    ]
    if costs.compiler_seconds:
        lines.append(f"  {seconds(costs.compiler_seconds):>9} by the compiler's own estimate of all operations")
    if costs.uncounted_loops:
        lines.append(f"  {costs.uncounted_loops} loops of unknown length are taken to run once")
    lines += [
        f"speed           {plan.examples_per_second:,.0f} examples/s, {plan.mfu:.1%} of the peak of "
        f"{chip.flops / 1e12:,.0f} TFLOP/s (MFU), at best",
        f"whole run       {plan.steps:,} steps, {duration(plan.steps * costs.step_seconds)}, "
        f"{plan.chip_hours:,.{0 if plan.chip_hours >= 10 else 2}f} chip-hours, {dollars(plan.chip_hours * price)} at "
        f"${price:.2f}",
    ]
    return lines


def suggestion(plan: Plan, config: ml_collections.ConfigDict) -> str:
    """What to change so that a plan that does not fit may fit: one line."""
    memory, hbm = plan.memory, plan.topology.chip.hbm_bytes
    if plain := [key for key, value in remat_keys(config).items() if value in ("none", False)]:
        flags = " ".join(f"--config.{key}={'True' if remat_keys(config)[key] is False else 'full'}" for key in plain)
        return f"keep only each block's input: {flags}"
    fixed = memory.peak - memory.temporaries
    room = 0.95 * hbm - fixed
    if room > 0 and "micro_batches" in config and config.model.vision.kind != "resnet":
        each = config.batch_size // (plan.mesh["replica"] * plan.mesh["fsdp"]) // config.micro_batches
        for k in range(max(2, math.ceil(memory.temporaries / room)), each + 1):
            if each % k == 0:
                return f"embed the batch in more parts: --config.micro_batches={k * config.micro_batches}"
    if plan.mesh["replica"] > 1:
        return "shard the parameters: --config.mesh.replica=1 --config.mesh.fsdp=-1"
    return f"{memory.peak / hbm:.1f} times the memory is needed: a larger slice, or a smaller batch"


def remat_keys(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Keys such as "model.vision.remat" → their values."""

    def walk(tree: Any, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in tree.items():
            if isinstance(value, ml_collections.ConfigDict):
                found |= walk(value, f"{prefix}{key}.")
            elif key == "remat":
                found[prefix + key] = value
        return found

    return walk(config, "")


def gib(amount: float) -> str:
    return f"{amount / GiB:,.2f} GiB"


def seconds(amount: float) -> str:
    return f"{amount:.2f} s" if amount >= 1 else f"{1e3 * amount:.1f} ms"


def duration(amount: float) -> str:
    """Of seconds, in the unit that suits a run."""
    if amount >= 8640:
        return f"{amount / 86400:,.1f} d"
    if amount >= 3600:
        return f"{amount / 3600:.1f} h"
    return f"{amount / 60:.1f} min" if amount >= 60 else f"{amount:.0f} s"


def dollars(amount: float) -> str:
    if amount < 0.01:
        return "less than $0.01"
    return f"${amount:,.0f}" if amount >= 10 else f"${amount:.2f}"
