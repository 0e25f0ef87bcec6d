"""What the configs for pods take, compiled for the TPUs that their first lines name.

    python -m launch.planning.table launch/planning/table.md

Writes a table in Markdown, after each plan; one that stands there already, of the same config, is not compiled again.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_collections

from clip_jax.files import write_atomically
from launch import command
from launch.planning import hardware
from launch.planning.report import gib, seconds
from launch.planning.step import Plan, compile_step
from launch.tasks import build_task


@dataclass(frozen=True)
class Row:
    """A config, as `--config` and its overrides name it, on a topology."""

    config: str
    topology: str
    overrides: str = ""

    def load(self) -> ml_collections.ConfigDict:
        config = command.load_config(self.config)
        flat = dict(word.split("=", 1) for word in self.overrides.split())
        config.update_from_flattened_dict({key: _value(text) for key, text in flat.items()})
        return config

    @property
    def name(self) -> str:
        overrides = "".join(f" `{word}`" for word in self.overrides.split())
        return f"{self.config.removeprefix('configs/')}{overrides}"


ROWS = (
    Row("configs/clip/vit_b32.py", "v5e:2x4"),
    Row("configs/clip/vit_l14_336.py", "v5p:4x4x8"),
    Row("configs/clip/vit_l14_336.py", "v5e:16x16"),
    Row(
        "configs/clip/vit_l14_336.py",
        "v5p:4x4x8",
        "model.vision.remat=none model.text.remat=none batch_size=2048",
    ),
    Row("configs/clip/nfnet_f6_bert.py", "v5p:8x8x8"),
    Row("configs/flamingo/flamingo_3b.py:pages", "v5e:8x8"),
    Row("configs/flamingo/flamingo_9b.py:pages", "v5e:8x8"),
    Row("configs/flamingo/flamingo_9b.py:pages", "v5e:16x16", "data.mixture.pages.batch_size=2048"),
    Row("configs/flamingo/flamingo_80b.py:pages", "v5p:8x8x8"),
    Row("configs/flamingo/flamingo_80b.py:pages", "v5e:16x16", "data.mixture.pages.batch_size=512 mesh.tensor=8"),
)
COLUMNS = ("config", "topology", "batch", "mesh", "fits", "memory on each chip", "of", "TFLOP on each chip",
           "times the gradient's", "step by the roofline", "limited by", "MFU at best", "run at best", "compiled in",
           "config's hash")  # fmt: skip
# What of a config a step depends on, beside the sizes of its streams.
OF_A_STEP = ("task", "batch_size", "micro_batches", "steps", "loss", "label_smoothing", "model", "frozen",
             "frozen_dtype", "mesh", "sharding_rules", "optimizer", "dtype")  # fmt: skip
OF_A_STREAM = ("images", "frames", "tokens", "batch_size", "weight")


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def config_hash(row: Row) -> str:
    """Of all that a plan depends on. A field that is off, or empty, is as one that a config does not have."""

    def on(tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return {key: part for key, value in tree.items() if (part := on(value))}
        return None if tree == "none" else tree

    config = row.load().to_dict()
    streams = config["data"]["mixture"].items()
    chosen = {key: config[key] for key in OF_A_STEP if key in config} | {
        "mixture": {name: {key: part[key] for key in OF_A_STREAM if key in part} for name, part in streams}
    }
    text = json.dumps([on(chosen), row.topology], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(path: Path) -> dict[tuple[str, str, str], str]:
    """The rows of a table: (config, topology, hash) → line."""
    found = {}
    for line in path.read_text().splitlines()[2:] if path.exists() else ():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        found[cells[0], cells[1], cells[-1]] = line
    return found


def write(path: Path) -> None:
    """Compiles what the table at `path` lacks."""
    done = read(path)
    header = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in ROWS:
        key = key_of(row)
        if key not in done:
            done[key] = line(row, compile_step(row.load(), hardware.parse(row.topology), build_task))
            print(done[key], flush=True)
            there = [done[other] for other in map(key_of, ROWS) if other in done]
            write_atomically(path, "\n".join([*header, *there]) + "\n")


def key_of(row: Row) -> tuple[str, str, str]:
    """(config, topology, hash) as they stand in the table."""
    return row.name, row.topology, config_hash(row)


def line(row: Row, plan: Plan) -> str:
    mesh = "×".join(str(size) for size in plan.mesh.values())
    batch = " + ".join(f"{size:,} {name}" for name, size in plan.batch.items())
    memory = [gib(plan.memory.peak), gib(plan.topology.chip.hbm_bytes)]
    start = [row.name, row.topology, batch, mesh, "yes" if plan.fits else "no", *memory]
    costs = plan.costs
    if costs is None:
        cells = [""] * 6
    else:
        cells = [
            f"{costs.flops / 1e12:,.1f}",
            f"{costs.flops / plan.model_flops:.3f}",
            seconds(costs.step_seconds),
            costs.limited_by,
            f"{plan.mfu:.1%}",
            f"{plan.steps * costs.step_seconds / 86400:,.1f} d, ${plan.chip_hours * plan.topology.chip.price:,.0f}",
        ]
    return "| " + " | ".join([*start, *cells, f"{plan.compile_seconds:.0f} s", config_hash(row)]) + " |"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    command.set_up()
    write(Path(sys.argv[1]))
