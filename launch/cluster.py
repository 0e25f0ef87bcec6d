"""Which of many processes this one is, on the platforms that we launch on (`launch/README.md`)."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax

from clip_jax.errors import ConfigError

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")  # of v4 and before, and of all since
HEARTBEAT_SECONDS = 60  # without one from a process, the others are stopped


def initialize(environ: Mapping[str, str] = os.environ) -> None:
    """Joins this process to the others, where there are any; on one machine it does nothing.

    Three cases: the variables of EXPLICIT, all of them; a step of SLURM with several tasks, one a node; a machine
    with TPUs, of a TPU VM or of a JobSet on GKE, where JAX asks the machine itself.

    Raises ConfigError where some of EXPLICIT are missing or are no numbers, or the others cannot be reached.
    """
    if (arguments := how(environ, has_tpu())) is None:
        return
    try:
        jax.distributed.initialize(
            **arguments,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,  # at the end they all wait for each other
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"joining the other processes: {str(error).splitlines()[0]}") from error


def leave(message: str, code: int = 1) -> NoReturn:
    """Exits with a message. One of several processes takes no leave: it would wait for those that wait for it."""
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def how(environ: Mapping[str, str], has_tpu: bool) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` is to be given, or None where this process is alone."""
    if any(name in environ for name in EXPLICIT):
        if missing := [name for name in EXPLICIT if not environ.get(name)]:
            raise ConfigError(f"{' and '.join(missing)} not set; several processes need all of {', '.join(EXPLICIT)}")
        address, count, process = (environ[name] for name in EXPLICIT)
        if not (count.isdecimal() and process.isdecimal() and int(process) < int(count)):
            raise ConfigError(f"JAX_PROCESS_ID is {process!r} of JAX_NUM_PROCESSES {count!r}; expected 0 … N-1 of N")
        return dict(coordinator_address=address, num_processes=int(count), process_id=int(process))
    if "SLURM_PROCID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        # Left alone JAX gives a task one of its node's GPUs; with one task a node it has all of them.
        gpus = environ.get("SLURM_GPUS_ON_NODE", "")
        ids = list(range(int(gpus))) if gpus.isdecimal() and environ.get("SLURM_NTASKS_PER_NODE") == "1" else None
        return dict(cluster_detection_method="slurm", local_device_ids=ids)
    if has_tpu and environ.get("JAX_PLATFORMS", "tpu") != "cpu":
        return {}
    return None


def has_tpu() -> bool:
    return any(Path(device).exists() for device in TPU_DEVICES)
