"""How a step grows with the pod: from 8 chips to 4,096, with as many examples on each.

    python -m launch.planning.growth --config configs/clip/vit_l14_336.py --table launch/planning/growth.md

Writes a table in Markdown, after each topology; one that stands there already is not compiled again.
"""

import re
from pathlib import Path

import jax
import ml_collections
from absl import flags

from clip_jax.errors import ConfigError
from clip_jax.files import write_atomically
from launch import command
from launch.planning import hardware
from launch.planning.report import gib, seconds
from launch.planning.step import Plan, compile_step
from launch.tasks import build_task

TOPOLOGIES = ("v5p:2x2x2", "v5p:4x4x4", "v5p:8x8x8", "v5p:16x16x16")
HEADER = """| topology | chips | batch | memory on each chip | TFLOP on each chip | sent by each chip | transfers | \
step by the roofline | MFU at best | examples/s |
|---|---|---|---|---|---|---|---|---|---|
"""

PER_CHIP = flags.DEFINE_integer("per_chip", 64, "Examples on each chip.")
TABLE = flags.DEFINE_string("table", None, "The Markdown file.")


def main(config: ml_collections.ConfigDict) -> None:
    if not TABLE.value:
        raise ConfigError("--table is missing: name a Markdown file")
    path = Path(TABLE.value)
    rows = dict(re.findall(r"^(\| (\S+:\S+) .*\|)$", path.read_text(), re.M)) if path.exists() else {}
    done = {name: row for row, name in rows.items()}
    for name in TOPOLOGIES:
        if name not in done:
            topology = hardware.parse(name)
            config.batch_size = PER_CHIP.value * topology.chips
            done[name] = row(name, compile_step(config, topology, build_task))
            print(done[name])
        text = HEADER + "".join(done[n] + "\n" for n in TOPOLOGIES if n in done)
        write_atomically(path, text)


def row(name: str, plan: Plan) -> str:
    start = [name, f"{plan.topology.chips:,}", f"{sum(plan.batch.values()):,}", gib(plan.memory.peak)]
    costs = plan.costs
    if costs is None:
        return "| " + " | ".join([*start, "does not fit", *[""] * 5]) + " |"
    sent = sum(traffic.bytes for traffic in costs.traffic)
    cells = [f"{costs.flops / 1e12:,.1f}", f"{sent / 1e9:,.2f} GB", seconds(costs.interconnect_seconds),
             seconds(costs.step_seconds), f"{plan.mfu:.1%}", f"{plan.examples_per_second:,.0f}"]  # fmt: skip
    return "| " + " | ".join([*start, *cells]) + " |"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    command.run(main, with_config=True)
