"""What a training step would take if its model FLOPs ran at the devices' peak: MFU is its share of what it takes."""

from typing import Any

import jax
import ml_collections

from launch.planning.hardware import CHIPS
from launch.planning.stand_in import without_data
from launch.planning.step import BuildTask, model_flops

# JAX's names of devices → chips.
TPUS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e",
        "TPU v6e": "v6e", "TPU7x": "tpu7x"}  # fmt: skip
# How the names of NVIDIA's begin → bfloat16 operations a second, dense, by their data sheets.
GPUS = {"NVIDIA A100": 312e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H100": 989e12,
        "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12}  # fmt: skip


def peak_flops(kind: str) -> float | None:
    """Of one device of such a `device_kind`, in bfloat16; None where it is not known (CPUs)."""
    if kind in TPUS:
        chip = CHIPS[TPUS[kind]]
        return chip.flops / chip.devices
    return next((flops for start, flops in GPUS.items() if kind.startswith(start)), None)


def ideal_seconds(config: ml_collections.ConfigDict, build_task: BuildTask, devices: list[Any]) -> float | None:
    """Of a step of the config on all these devices; None where their peak is not known."""
    peak = peak_flops(devices[0].device_kind)
    if peak is None:
        return None
    with without_data(config) as plain:
        return model_flops(plain, build_task, jax.local_devices()[:1]) / (peak * len(devices))
