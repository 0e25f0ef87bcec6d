"""How a step grows with the pod: ViT-L/14@336 from 8 chips to 4,096, with 64 pairs on each. Parameters are sharded over
up to 64 chips, and replicated beyond.

    python -m launch.planning.growth launch/planning/growth.json

Writes all figures of each plan to that file, and tables of them in Markdown beside it, after each topology. A plan that
is there already, of the same config, is not compiled again.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from clip_jax.files import write_atomically
from launch import command
from launch.planning import hardware
from launch.planning.report import KINDS, gib, seconds, to_json
from launch.planning.step import compile_step
from launch.planning.table import Row
from launch.tasks import build_task

PER_CHIP = 64
ROWS = tuple(
    Row("configs/clip/vit_l14_336.py", f"v5p:{n}x{n}x{n}",
        f"batch_size={PER_CHIP * n**3} mesh.fsdp={min(64, n**3)} mesh.replica=-1")
    for n in (2, 4, 8, 16)
)  # fmt: skip
VERBS = {  # of a collective's purpose → its line
    "gathered": "parameters gathered",
    "summed": "gradients summed",
    "passed on": "either, in rings beside the products",
    "exchanged": "either, exchanged among all",
}
LOSS = "embeddings, by the loss"

Plans = dict[str, dict[str, Any]]  # topology → `to_json` of its plan


def write(path: Path) -> None:
    """Compiles what the file at `path` lacks."""
    done: Plans = json.loads(path.read_text()) if path.exists() else {}
    for row in ROWS:
        if done.get(row.topology, {}).get("digest") != row.digest():
            plan = compile_step(row.load(), hardware.parse(row.topology), build_task)
            done[row.topology] = {"digest": row.digest(), **to_json(plan)}
            print(f"{row.topology}: {gib(plan.memory.peak)}, {plan.compile_seconds:.0f} s of CPU time", flush=True)
        there = {row.topology: done[row.topology] for row in ROWS if row.topology in done}
        write_atomically(path, json.dumps(there, indent=1) + "\n")
        write_atomically(path.with_suffix(".md"), to_markdown(list(there.values())))


def to_markdown(plans: list[dict[str, Any]]) -> str:
    """A column for each plan: the step, its memory by kind, what a chip sends by purpose."""
    step = {
        "batch": [f"{sum(plan['batch'].values()):,}" for plan in plans],
        "TFLOP on each chip": [f"{plan['flops_per_chip'] / 1e12:,.1f}" for plan in plans],
        "step by the roofline": [seconds(plan["step_seconds"]) for plan in plans],
        "limited by": [plan["limited_by"] for plan in plans],
        "transfers, hidden behind it": [seconds(plan["interconnect_seconds"]) for plan in plans],
        "MFU at best": [f"{plan['mfu']:.1%}" for plan in plans],
        "examples/s": [f"{plan['examples_per_second']:,.0f}" for plan in plans],
    }
    kinds = [kind for kind in KINDS if any(plan["memory_bytes"][kind] for plan in plans)]
    memory = {KINDS[kind]: [gib(plan["memory_bytes"][kind]) for plan in plans] for kind in kinds}
    memory["together"] = [gib(plan["peak_bytes"]) for plan in plans]
    sent = {line: [0.0] * len(plans) for line in (*VERBS.values(), LOSS)}
    for i, plan in enumerate(plans):
        for part in plan["collectives"]:
            verb, _, where = part["purpose"].partition(" in ")
            line = LOSS if where == "the loss" else VERBS[verb.partition(" for ")[0]]
            sent[line][i] += part["bytes"]
    sent["together"] = [sum(column) for column in zip(*sent.values(), strict=True)]
    traffic = {line: [f"{amount / 1e6:,.0f} MB" for amount in amounts] for line, amounts in sent.items()}
    chips = [f"{plan['topology']}, {plan['chips']:,} chips" for plan in plans]
    parts = {"a step": step, "memory on each chip": memory, "sent by each chip": traffic}
    return "\n".join(_table(title, chips, lines) for title, lines in parts.items())


def _table(title: str, columns: list[str], lines: dict[str, list[str]]) -> str:
    rows = [[title, *columns], ["---"] * (1 + len(columns)), *([name, *cells] for name, cells in lines.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    command.set_up()
    write(Path(sys.argv[1]))
