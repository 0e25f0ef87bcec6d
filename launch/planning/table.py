"""What the configs for pods take, compiled for the TPUs that their first lines name.

    python -m launch.planning.table launch/planning/table.md

Writes a table in Markdown, after each plan; one that stands there already, of the very same program (its digest is the
last column), is not compiled again.
"""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_collections

from clip_jax.files import write_atomically
from launch import command
from launch.planning import hardware
from launch.planning.report import gib, seconds
from launch.planning.step import Plan, compile_step, lower_step
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

    @property
    def key(self) -> tuple[str, str]:
        """The first two cells of its line."""
        return self.name, self.topology


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
           f"program, by jax {jax.__version__}")  # fmt: skip


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def read(path: Path) -> dict[tuple[str, str], list[str]]:
    """The rows of a table: (config, topology) → cells, the last of which is the program's digest."""
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
        if row.key not in done or done[row.key][-1] != lower_step(config, topology, build_task).digest():
            done[row.key] = cells(row, compile_step(config, topology, build_task))
            print(" | ".join(done[row.key]), flush=True)
        there = [done[row.key] for row in ROWS if row.key in done]
        write_atomically(path, "\n".join([*header, *(f"| {' | '.join(line)} |" for line in there)]) + "\n")


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
            f"{plan.steps * costs.step_seconds / 86400:,.1f} d, ${plan.chip_hours * plan.topology.chip.price:,.0f}",
        ]
    return [*start, *figures, f"{plan.compile_seconds:.0f} s", plan.program]


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    command.set_up()
    write(Path(sys.argv[1]))
