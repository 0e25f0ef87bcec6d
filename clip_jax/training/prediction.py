"""What `launch.plan --json` predicted for a run, to stand beside what is measured."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from clip_jax.errors import ConfigError

FILE = "plan.json"
# A plan's figure → the measured one that it is compared with.
MEASURED = {
    "step_seconds": "step_seconds",
    "examples_per_second": "examples_per_second",
    "mfu": "mfu",
    "peak_bytes": "memory_bytes",
}


def read_prediction(path: str, workdir: Path, batch: Mapping[str, int], devices: int) -> dict[str, float]:
    """Measured figure → what the plan at `path`, or else `workdir`/plan.json, says it is at best; {} without a plan.

    A plan of another batch or of fewer chips than would go into `devices` is another run's: it is named, and left out.
    Raises ConfigError where the file is missing or no plan of one topology that fits.
    """
    file = Path(path) if path else workdir / FILE
    if not path and not file.is_file():
        return {}
    try:
        plan = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"plan {file}: not what launch.plan --json writes ({error})") from None
    kinds = {"batch": dict, "chips": int, "topology": str} | dict.fromkeys(MEASURED, int | float)
    whole = isinstance(plan, dict) and all(isinstance(plan.get(key), kind) for key, kind in kinds.items())
    if not whole or plan["chips"] < 1:
        raise ConfigError(f"plan {file}: expected the plan of a step that fits, as launch.plan --json FILE writes it")
    if plan["batch"] != dict(batch) or devices % plan["chips"]:
        logging.warning("%s is for %s on %d chips; this run has %s on %d devices: not compared",
                        file, plan["batch"], plan["chips"], dict(batch), devices)  # fmt: skip
        return {}
    logging.info("%s predicts for %s: %s", file, plan["topology"],
                 ", ".join(f"{key} {plan[key]:.4g}" for key in MEASURED))  # fmt: skip
    return {measured: float(plan[key]) for key, measured in MEASURED.items()}
