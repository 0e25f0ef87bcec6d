"""Whether a config's training step fits on TPUs, what it costs and what limits it: compiled for them, without any.

    python -m launch.plan --config configs/clip/vit_l14_336.py --topology v5p:4x4x8
    python -m launch.plan --config FILE --topology v5litepod-256 --config.micro_batches=2 --json plan.json
    python -m launch.plan --config FILE --topology v5e:2x4 --search

Needs the extra `tpu` (libtpu, whose compiler needs no TPU), no data, no network. Exits with 1, and a suggestion, where
the step does not fit. Times are rooflines: no step is faster; how near one comes, only a TPU tells.
"""

import json
import sys
from pathlib import Path

import jax
import ml_collections
from absl import flags

from clip_jax.errors import ConfigError
from clip_jax.files import write_atomically
from launch import command
from launch.planning import hardware, report, search
from launch.planning.step import compile_step
from launch.tasks import build_task

TOPOLOGY = flags.DEFINE_string("topology", None, f"TPUs to plan for: {hardware.EXAMPLES}.")
SLICES = flags.DEFINE_integer("slices", 1, "How many slices of that topology.")
SEARCH = flags.DEFINE_boolean("search", False, "Try meshes, rematerialisation and micro-batches; rank what fits.")
PRICE = flags.DEFINE_float("price", None, "Dollars for a chip and hour, instead of the list price.")
JSON = flags.DEFINE_string("json", None, "File to write the same figures to.", allow_override=True)


def main(config: ml_collections.ConfigDict) -> None:
    if not TOPOLOGY.value:
        raise ConfigError(f"--topology is missing: name TPUs, such as {hardware.EXAMPLES}")
    topology = hardware.parse(TOPOLOGY.value, SLICES.value)
    if SEARCH.value:
        found = search.search(config, topology, build_task)
        print(search.to_text(found))
        figures: object = [result.to_json(PRICE.value) for result in found]
        fits, tip = any(result.plan.fits for result in found), "a larger slice, or a smaller batch"
    else:
        plan = compile_step(config, topology, build_task)
        print(report.to_text(plan, PRICE.value))
        figures, fits, tip = report.to_json(plan, PRICE.value), plan.fits, report.suggestion(plan, config)
    if JSON.value:
        write_atomically(Path(JSON.value), json.dumps(figures, indent=1) + "\n")
    if not fits:
        sys.exit(f"does not fit on {topology.name}; try: {tip}")


if __name__ == "__main__":
    # Here and nowhere else JAX must not look for a TPU: the compiler would take it for one.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # programs for TPUs can't be read back without one
    command.run(main, with_config=True)
