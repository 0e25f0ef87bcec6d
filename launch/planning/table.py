"""What the configs for pods take, compiled for the TPUs that their first lines name.

    python -m launch.planning.table launch/planning/table.md

Writes a table in Markdown, after each plan; one that stands there already, of the same config and of the very same
program (a digest of each is in the last columns), is not compiled again.
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
from launch.planning.report import dollars, duration, gib, seconds
from launch.planning.step import Plan, compile_step, lower_step
from launch.tasks import build_task

# What of a config a step depends on, beside the sizes of its streams.
OF_A_STEP = ("task", "batch_size", "micro_batches", "steps", "loss", "label_smoothing", "model", "frozen",
             "frozen_dtype", "adapters", "mesh", "sharding_rules", "optimizer", "guard", "dtype")  # fmt: skip
OF_A_STREAM = ("images", "frames", "tokens", "batch_size", "weight")


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

    @property
    def key(self) -> tuple[str, str]:
        """The first two cells of its line."""
        return self.name, self.topology

    def digest(self) -> str:
        """Of all of the config that a plan depends on. A field that is off, or empty, is as one that is not there."""

        def on(tree: Any) -> Any:
            if isinstance(tree, Mapping):
                return {key: part for key, value in tree.items() if (part := on(value))}
            return None if tree == "none" else tree

        config = self.load().to_dict()
        streams = config["data"]["mixture"].items()
        chosen = {key: config[key] for key in OF_A_STEP if key in config} | {
            "mixture": {name: {key: part[key] for key in OF_A_STREAM if key in part} for name, part in streams}
        }
        text = json.dumps([on(chosen), self.topology], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    Row("configs/clip/vit_b16.py", "v5e:8x8"),
    Row("configs/clip/vit_l14.py", "v5e:16x16"),
    Row("configs/clip/rn50.py", "v5e:16x16"),
    Row("configs/clip/siglip_b16.py", "v5e:8x8"),
    Row("configs/clip/lit.py:ViT-B/16", "v5e:4x4"),
    Row("configs/clip/finetune.py", "v5e:1x1"),
    Row("configs/flamingo/flamingo_3b.py:pages", "v5e:8x8"),
    Row("configs/flamingo/flamingo_9b.py:pages", "v5e:8x8"),
    Row("configs/flamingo/flamingo_9b.py:pages", "v5e:16x16", "data.mixture.pages.batch_size=2048"),
    Row("configs/flamingo/flamingo_80b.py:pages", "v5p:8x8x8"),
    Row("configs/flamingo/flamingo_80b.py:pages", "v5e:16x16", "data.mixture.pages.batch_size=512 mesh.tensor=8"),
    Row("configs/flamingo/open_flamingo_3b.py", "v5e:8x8"),
    Row("configs/flamingo/open_flamingo_9b.py", "v5e:16x16"),
    Row("configs/flamingo/idefics_9b.py", "v5e:16x16"),
    Row("configs/flamingo/smollm2.py", "v5e:1x1"),
    Row("configs/flamingo/instruct.py", "v5e:1x1"),
)
COLUMNS = ("config", "topology", "batch", "mesh", "fits", "memory on each chip", "of", "TFLOP on each chip",
           "times the gradient's", "step by the roofline", "limited by", "MFU at best", "run at best", "compiled in",
           f"program, by jax {jax.__version__}", "config's digest")  # fmt: skip


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def read(path: Path) -> dict[tuple[str, str], list[str]]:
    """The rows of a table: (config, topology) → cells; the last two are the program's digest and the config's."""
    found = {}
    for line in path.read_text().splitlines()[2:] if path.exists() else ():
        cells = line.removeprefix("| ").removesuffix(" |").split(" | ")
        found[cells[0], cells[1]] = cells
    return found


def write(path: Path) -> None:
    """Compiles what the table at `path` lacks."""
    done = read(path)
    header = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    for row in ROWS:
        config, topology = row.load(), hardware.parse(row.topology)
        there = done.get(row.key, ["", ""])
        if there[-1] != row.digest() or there[-2] != lower_step(config, topology, build_task).digest():
            done[row.key] = cells(row, compile_step(config, topology, build_task))
            print(" | ".join(done[row.key]), flush=True)
        lines = [f"| {' | '.join(done[row.key])} |" for row in ROWS if row.key in done]
        write_atomically(path, "\n".join([*header, *lines]) + "\n")


def cells(row: Row, plan: Plan) -> list[str]:
    """A line of the table."""
    mesh = "×".join(str(size) for size in plan.mesh.values())
    batch = " + ".join(f"{size:,} {name}" for name, size in plan.batch.items())
    memory = [gib(plan.memory.peak), gib(plan.topology.chip.hbm_bytes)]
    start = [row.name, row.topology, batch, mesh, "yes" if plan.fits else "no", *memory]
    costs = plan.costs
    if costs is None:
        figures = [""] * 6
    else:
        figures = [
            f"{costs.flops / 1e12:,.1f}",
            f"{costs.flops / plan.model_flops:.3f}",
            seconds(costs.step_seconds),
            costs.limited_by,
            f"{plan.mfu:.1%}",
            f"{duration(plan.steps * costs.step_seconds)}, {dollars(plan.chip_hours * plan.topology.chip.price)}",
        ]
    return [*start, *figures, f"{plan.compile_seconds:.0f} s", plan.program, row.digest()]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    command.set_up()
    write(Path(sys.argv[1]))
